"""The rounds of a run, whatever carries the messages: sample, step, evaluate, write down."""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fedelta.errors import BadUpdate, ClientFailed, FedeltaError, TooFewUpdates, in_one_line, one_line
from fedelta.federation.client import Trainer
from fedelta.federation.engines.evaluation import Evaluator
from fedelta.federation.engines.observer import Observer
from fedelta.federation.records import Bytes, Events, RoundRecord
from fedelta.federation.reply import ClientReply
from fedelta.federation.run_folder import RunFolder
from fedelta.federation.server import RoundOutcome, Server, ServerState
from fedelta.learning.data import Examples
from fedelta.learning.training.stopwatch import Stopwatch
from fedelta.protocol.messages import ClientUpdate
from fedelta.protocol.serialization import ByteCount
from fedelta.seeds import derive_seed


class Draw(NamedTuple):
    """Who takes part in a round.

    Args:
        clients: sampled, in the order in which their updates are folded in.
        absent: those of them that are simulated to vanish after the download.
        attempt: how often the round has been tried before.
    """

    clients: Sequence[str]
    absent: frozenset[str]
    attempt: int


class Traffic:
    """Bytes of a round by client, over all attempts at it."""

    def __init__(self) -> None:
        self.down: dict[str, ByteCount] = {}
        self.up: dict[str, ByteCount] = {}

    def count(self, reply: ClientReply) -> None:
        client = reply.client
        self.down[client] = self.down.get(client, ByteCount()).plus(reply.down)
        self.up[client] = self.up.get(client, ByteCount()).plus(reply.up)

    def total_down(self) -> Bytes:
        """Bytes to all clients together."""
        return _total(self.down)

    def total_up(self) -> Bytes:
        """Bytes from all clients together."""
        return _total(self.up)


def _total(counts: Mapping[str, ByteCount]) -> Bytes:
    total = ByteCount()
    for count in counts.values():
        total = total.plus(count)
    return {
        "adapter": total.adapter,
        "heads": total.heads,
        "patch": total.patch,
        "overhead": total.overhead,
        "total": total.total,
    }


def read_update(client: str, facts: Mapping[str, Any], blob: bytes) -> ClientUpdate | Exception:
    """An update, or why there is none.

    Args:
        client: whom it must be from.
        facts: holds `refused` or `failed`, with the reason, where there is none.
    """
    if "failed" in facts:
        return ClientFailed(client, one_line(facts["failed"]))
    if "refused" in facts:
        return BadUpdate(client, one_line(facts["refused"]))
    try:
        return ClientUpdate.from_bytes(blob, client)
    except BadUpdate as error:
        return error
    except Exception as error:
        # Whatever a blob may do to whoever reads it, it costs its sender's round and nobody else's.
        return BadUpdate(client, in_one_line(error))


def explain(error: Exception) -> dict[str, str]:
    """What `read_update` is told of a client whose part in a round ended like this."""
    if isinstance(error, BadUpdate):
        return {"refused": error.reason}
    # A client may fail in any way; the round goes on without it, and says so.
    return {"refused": str(error)} if isinstance(error, FedeltaError) else {"failed": in_one_line(error)}


@dataclass(frozen=True, eq=False)
class EngineContext:
    """What every engine works with.

    Args:
        server: the rules of the run.
        trainer: the server's own model, on which it evaluates.
        evaluator: evaluates the global model.
        validation: the server's rows, on which the global model is followed.
        folder: receives rounds and checkpoints.
        observer: is told of progress.
    """

    server: Server
    trainer: Trainer
    evaluator: Evaluator
    validation: Examples
    folder: RunFolder
    observer: Observer


class Engine(ABC):
    """Runs rounds until the configured number is done.

    Subclasses carry the messages.
    """

    def __init__(self, context: EngineContext) -> None:
        self.server = server = context.server
        self.trainer = context.trainer
        self.evaluator = context.evaluator
        self.validation = validation = context.validation
        self.folder = context.folder
        self.observer = context.observer
        self.evaluated_client_rounds = 0
        self._loss_rows = validation
        if (rows := server.ranks.loss_rows) is not None:
            order = np.random.default_rng(derive_seed(server.seed, "loss rows")).permutation(len(validation))
            self._loss_rows = validation.select(sorted(order[:rows].tolist()))

    spare: ClassVar[bool] = False
    """Whether clients beyond those that a round keeps are sampled."""

    @abstractmethod
    def replies(self, state: ServerState, draw: Draw, watch: Stopwatch, inside: Stopwatch) -> Iterator[ClientReply]:
        """Have these clients train, and yield their replies in this order.

        Args:
            watch: counts the seconds of `clients` and `messages` here.
            inside: counts what ran in workers, by phase.
        """

    def events(self) -> Events:
        """What else happened since the last round, for its line in `rounds.jsonl`."""
        return {"late": {}, "bytes_late": 0, "caught_up": {}}

    def run(
        self, state: ServerState, rounds: int, evaluate_every: int, evaluated_client_rounds: int = 0
    ) -> ServerState:
        """Go on from a state, fresh or from a checkpoint, to the end.

        Args:
            rounds: after which the run ends.
            evaluate_every: so many of them the global model is evaluated.
            evaluated_client_rounds: in so many, from the first, each client's own model is too.
        """
        self.evaluated_client_rounds = evaluated_client_rounds
        # After a resume the shared base is blank; a client that was up to date needs the folded one.
        self.trainer.catch_up(state.log.since(self.trainer.base.version))
        while state.round < rounds:
            due = (state.round + 1) % evaluate_every == 0 or state.round + 1 == rounds
            state = self._round(state, due)
        return state

    def _round(self, state: ServerState, evaluation_due: bool) -> ServerState:
        watch, inside = Stopwatch(), Stopwatch()
        traffic = Traffic()
        failed: list[dict[str, str]] = []
        while True:
            used: list[ClientReply] = []
            try:
                replies = self._replies(state, len(failed), traffic, watch, inside, used)
                after, outcome = self.server.step(state, replies)
                break
            except TooFewUpdates as error:
                failed.append(error.skipped)
                if len(failed) == self.server.settings.attempts:
                    raise
                self.observer.warn(f"{error}; it is tried again")
        for client, reason in outcome.skipped.items():
            self.observer.warn(f"round {state.round}: {client} skipped: {reason}")
        watch.lap("aggregation")
        # Before the round's patch: on the base that they trained on.
        own = {r.client: self._evaluate_client(state, r) for r in used if r.client in outcome.contributors}
        self.trainer.catch_up(after.log.since(self.trainer.base.version))
        scores = self.evaluator.evaluate(after, self.validation, "validation", inside) if evaluation_due else None
        watch.lap("evaluation")
        record = _record(state, after, outcome, scores, traffic, self.trainer.task.metric, failed, own, self.events())
        timing = {
            "round": state.round,
            "seconds": dict(watch.seconds),
            "in_workers": dict(inside.seconds),
            "counts": dict(inside.counts),
        }
        self.folder.finish_round(after, self.trainer.kept, self.trainer.error_feedback, record, timing)
        self.observer.round_done(record)
        return after

    def _replies(
        self,
        state: ServerState,
        attempt: int,
        traffic: Traffic,
        watch: Stopwatch,
        inside: Stopwatch,
        used: list[ClientReply],
    ) -> Iterator[ClientReply]:
        clients = self.server.sample(state, attempt, self.spare)
        absent = frozenset(client for client in clients if self.server.drops_out(state, client, attempt))
        self.observer.clients_started(state.round, len(clients))
        for reply in self.replies(state, Draw(clients, absent, attempt), watch, inside):
            traffic.count(reply)
            # Where clients keep factors of their own, what they sent is no model.
            if state.round < self.evaluated_client_rounds and not self.server.method.personal:
                used.append(reply)
            watch.lap("messages")
            self.observer.client_done(reply.client)
            yield reply._replace(loss=self._loss(state, reply))
            # Whatever ran since the reply was handed over is the server's folding it in.
            watch.lap("aggregation")

    def _evaluate_client(self, state: ServerState, reply: ClientReply) -> dict[str, float | None]:
        assert isinstance(reply.update, ClientUpdate)
        scores = self.evaluator.evaluate_client(state, reply.sent, reply.update, self.validation)
        # To look at a client must not end the run: what is not finite is left out.
        finite = {name: value if math.isfinite(value) else None for name, value in scores.items()}
        return {"rank": reply.update.rank, **finite}

    def _loss(self, state: ServerState, reply: ClientReply) -> float | None:
        """On the server's own rows, where ranks are given out by that."""
        ranks, update = self.server.ranks, reply.update
        if ranks.loss_on == "own" or not self.server.to_be_judged(state, reply.client):
            return None
        if not isinstance(update, ClientUpdate):
            return None
        try:
            loss = self.evaluator.evaluate_client(state, reply.sent, update, self._loss_rows)["loss"]
        except BadUpdate:
            return None  # it will be refused
        return loss if math.isfinite(loss) else None


def _record(
    before: ServerState,
    after: ServerState,
    outcome: RoundOutcome,
    scores: Mapping[str, float] | None,
    traffic: Traffic,
    metric: str,
    failed_attempts: list[dict[str, str]],
    clients_validation: dict[str, dict[str, float | None]],
    events: Events,
) -> RoundRecord:
    ranks = Counter(after.ranks.values())
    relative = {module: deviation.relative for module, deviation in outcome.deviation.items()}
    return {
        "round": before.round,
        "clients": outcome.contributors,
        "skipped": outcome.skipped,
        "promoted": outcome.promoted,
        "pruned": outcome.pruned,
        "ranks": {str(rank): ranks[rank] for rank in sorted(ranks)},
        "train_loss": outcome.train_loss,
        "validation": scores,
        "metric": metric,
        "bytes_down": traffic.total_down(),
        "bytes_up": traffic.total_up(),
        "bytes_by_client": {client: [count.total, traffic.up[client].total] for client, count in traffic.down.items()},
        "deviation": relative,
        "scaled_deviation": {module: deviation.scaled for module, deviation in outcome.deviation.items()},
        "deviation_mean": sum(relative.values()) / len(relative) if relative else None,
        "patch_width": outcome.patch_width,
        "energy_by_rank": outcome.energy,
        "version": after.log.version,
        "failed_attempts": failed_attempts,
        "clients_validation": clients_validation,
        **events,
    }
