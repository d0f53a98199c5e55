"""The rounds of a run, whatever carries the messages: sample, step, evaluate, write down."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fedelta.client import Trainer
from fedelta.data import Examples
from fedelta.engines.evaluation import Evaluator
from fedelta.engines.observer import Observer
from fedelta.errors import BadUpdate, ClientFailed, FedeltaError
from fedelta.intake import Reply
from fedelta.messages import Broadcast, ClientUpdate
from fedelta.packing import ByteCount
from fedelta.server import RoundOutcome, Server, ServerState
from fedelta.stopwatch import Stopwatch
from fedelta.tracking import RunFolder

MOST_OF_A_REASON = 1000
"""Characters of a client's own words that are kept."""


class Answer(NamedTuple):
    """What a client was sent and what came of it.

    Args:
        sent: the broadcast.
        update: its update, or why there is none.
        down, up: bytes as serialised; none up where nothing came.
    """

    client: str
    sent: Broadcast
    update: ClientUpdate | Exception
    down: ByteCount
    up: ByteCount


def read_update(client: str, facts: Mapping[str, Any], blob: bytes) -> ClientUpdate | Exception:
    """An update, or why there is none.

    Args:
        client: whom it must be from.
        facts: holds `refused` or `failed`, with the reason, where there is none.
    """
    if "failed" in facts:
        return ClientFailed(client, _line(facts["failed"]))
    if "refused" in facts:
        return BadUpdate(client, _line(facts["refused"]))
    try:
        return ClientUpdate.from_bytes(blob, client)
    except BadUpdate as error:
        return error
    except FedeltaError as error:
        return BadUpdate(client, str(error))


def _line(reason: object) -> str:
    """What somebody else wrote, as one line of bounded length."""
    return " ".join(str(reason)[:MOST_OF_A_REASON].split())


class Engine(ABC):
    """Runs rounds until the configured number is done.

    Args:
        server: the rules.
        trainer: the server's own model, on which it evaluates.
        evaluator: of the global model.
        validation: the server's rows, on which the global model is followed.
        folder: where rounds and checkpoints go.
        observer: is told of progress.
    """

    def __init__(
        self,
        server: Server,
        trainer: Trainer,
        evaluator: Evaluator,
        validation: Examples,
        folder: RunFolder,
        observer: Observer,
    ) -> None:
        self.server = server
        self.trainer = trainer
        self.evaluator = evaluator
        self.validation = validation
        self.folder = folder
        self.observer = observer

    @abstractmethod
    def answers(
        self, state: ServerState, clients: Sequence[str], watch: Stopwatch, inside: Stopwatch
    ) -> Iterator[Answer]:
        """Have these clients train, and yield their answers in this order.

        Args:
            watch: counts the seconds of `clients` and `messages` here.
            inside: counts what ran in workers, by phase.
        """

    def run(self, state: ServerState, rounds: int, evaluate_every: int) -> ServerState:
        """Go on from a state, fresh or from a checkpoint, to the end."""
        # After a resume the shared base is blank; a client that was up to date needs the folded one.
        self.trainer.catch_up(state.log.since(self.trainer.base.version))
        while state.round < rounds:
            due = (state.round + 1) % evaluate_every == 0 or state.round + 1 == rounds
            state = self._round(state, due)
        return state

    def _round(self, state: ServerState, evaluation_due: bool) -> ServerState:
        watch, inside = Stopwatch(), Stopwatch()
        clients = self.server.sample(state)
        self.observer.clients_started(state.round, len(clients))
        down: dict[str, ByteCount] = {}
        up: dict[str, ByteCount] = {}

        def replies() -> Iterator[Reply]:
            for answer in self.answers(state, clients, watch, inside):
                down[answer.client] = answer.down
                if isinstance(answer.update, ClientUpdate):
                    up[answer.client] = answer.up
                watch.lap("messages")
                self.observer.client_done(answer.client)
                yield Reply(answer.sent, answer.update)
                # Whatever ran since the reply was handed over is the server's folding it in.
                watch.lap("aggregation")

        after, outcome = self.server.step(state, replies())
        for client, reason in outcome.skipped.items():
            self.observer.warn(f"round {state.round}: {client} skipped: {reason}")
        watch.lap("aggregation")
        self.trainer.catch_up(after.log.since(self.trainer.base.version))
        scores = self.evaluator.evaluate(after, self.validation, "validation", inside) if evaluation_due else None
        watch.lap("evaluation")
        record = _record(state, after, outcome, scores, down, up)
        timing = {
            "round": state.round,
            "seconds": dict(watch.seconds),
            "in_workers": dict(inside.seconds),
            "counts": dict(inside.counts),
        }
        self.folder.finish_round(after, self.trainer.kept, record, timing)
        self.observer.round_done(record)
        return after


def _record(
    before: ServerState,
    after: ServerState,
    outcome: RoundOutcome,
    scores: Mapping[str, float] | None,
    down: Mapping[str, ByteCount],
    up: Mapping[str, ByteCount],
) -> dict[str, Any]:
    def bytes_of(counts: Mapping[str, ByteCount]) -> dict[str, int]:
        total = ByteCount()
        for count in counts.values():
            total = total.plus(count)
        return {**total._asdict(), "total": total.total}

    ranks = Counter(after.ranks.values())
    return {
        "round": before.round,
        "clients": outcome.contributors,
        "skipped": outcome.skipped,
        "promoted": outcome.promoted,
        "pruned": outcome.pruned,
        "ranks": {str(rank): ranks[rank] for rank in sorted(ranks)},
        "train_loss": outcome.train_loss,
        "validation": scores,
        "bytes_down": bytes_of(down),
        "bytes_up": bytes_of(up),
        "bytes_by_client": {
            client: [count.total, up[client].total if client in up else 0] for client, count in down.items()
        },
        "deviation": outcome.deviation,
        "deviation_mean": sum(outcome.deviation.values()) / len(outcome.deviation) if outcome.deviation else None,
        "patch_width": outcome.patch_width,
        "version": after.log.version,
    }
