"""The in-process engine: every client in turn, on one shared base model.

Messages are serialised as on a wire, so that bytes are measured and a client sees what a real one would.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from fedelta.client import Trainer
from fedelta.data import Examples, Shard
from fedelta.engines.observer import Observer
from fedelta.errors import BadUpdate, FedeltaError
from fedelta.intake import Reply
from fedelta.messages import ClientUpdate
from fedelta.packing import ByteCount, count_bytes
from fedelta.server import RoundOutcome, Server, ServerState
from fedelta.tracking import RunFolder
from fedelta.training import evaluate


class Stopwatch:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Count the time since the last lap for this phase."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


class LocalEngine:
    """Runs rounds until the configured number is done.

    Args:
        server: the rules.
        trainer: the model that every client borrows.
        shards: client → its rows.
        validation: the server's rows, on which the global model is followed.
        folder: where rounds and checkpoints go.
        observer: is told of progress.
    """

    def __init__(
        self,
        server: Server,
        trainer: Trainer,
        shards: Mapping[str, Shard],
        validation: Examples,
        folder: RunFolder,
        observer: Observer,
    ) -> None:
        self.server = server
        self.trainer = trainer
        self.shards = shards
        self.validation = validation
        self.folder = folder
        self.observer = observer

    def run(self, state: ServerState, rounds: int, evaluate_every: int) -> ServerState:
        """Go on from a state, fresh or from a checkpoint, to the end."""
        # After a resume the shared base is blank; a client that was up to date needs the folded one.
        self.trainer.catch_up(state.log.since(self.trainer.base.version))
        while state.round < rounds:
            due = (state.round + 1) % evaluate_every == 0 or state.round + 1 == rounds
            state = self._round(state, due)
        return state

    def _round(self, state: ServerState, evaluation_due: bool) -> ServerState:
        watch = Stopwatch()
        clients = self.server.sample(state)
        self.observer.clients_started(state.round, len(clients))
        down: dict[str, ByteCount] = {}
        up: dict[str, ByteCount] = {}

        def replies() -> Iterator[Reply]:
            for client in clients:
                # Whatever ran since the last reply was handed over is the server's folding it in.
                watch.lap("aggregation")
                sent = self.server.broadcast(state, client)
                blob = sent.to_bytes()
                down[client] = count_bytes(blob)
                watch.lap("messages")
                update: ClientUpdate | Exception
                try:
                    answer = self._answer(state, client, blob)
                    update = ClientUpdate.from_bytes(answer, client)
                    up[client] = count_bytes(answer)
                except FedeltaError as error:
                    update = error if isinstance(error, BadUpdate) else BadUpdate(client, str(error))
                except Exception as error:
                    # A client may fail in any way; the round goes on without it, and says so.
                    update = error
                watch.lap("clients")
                self.observer.client_done(client)
                yield Reply(sent, update)

        after, outcome = self.server.step(state, replies())
        for client, reason in outcome.skipped.items():
            self.observer.warn(f"round {state.round}: {client} skipped: {reason}")
        watch.lap("aggregation")
        self.trainer.catch_up(after.log.since(self.trainer.base.version))
        scores = self.evaluate(after, self.validation, "validation") if evaluation_due else None
        watch.lap("evaluation")
        record = _record(state, after, outcome, scores, down, up)
        timing = {"round": state.round, "seconds": dict(watch.seconds)}
        self.folder.finish_round(after, self.trainer.kept, record, timing)
        self.observer.round_done(record)
        return after

    def _answer(self, state: ServerState, client: str, blob: bytes) -> bytes:
        if self.server.drops_out(state, client):
            raise TimeoutError("dropped out")
        return self.trainer.answer(blob, self.shards[client])

    def evaluate(self, state: ServerState, examples: Examples, split: str) -> dict[str, float]:
        """Scores of the global model: base with all patches, adapter at rank R, heads.

        Where clients keep factors of their own there is no such model: the mean of the scores of each client's own.
        """
        if self.trainer.base.version != state.log.version:
            raise FedeltaError(f"base is at version {self.trainer.base.version}, the server at {state.log.version}")
        if self.server.method.personal:
            adapters = list(self.server.personal_adapters(state, self.trainer.kept).values())
        else:
            adapters = [state.method.adapter.with_scale(self.server.scale(state.method.adapter.rank))]
        self.observer.evaluation_started(split, len(examples) * len(adapters))
        scores: Counter[str] = Counter()
        for adapter in adapters:
            self.trainer.model.load(adapter, state.heads)
            scores.update(
                evaluate(
                    self.trainer.model,
                    self.trainer.tokenizer,
                    examples,
                    self.trainer.evaluation_batch,
                    self.observer.evaluation_advanced,
                )
            )
        return {name: total / len(adapters) for name, total in scores.items()}


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
