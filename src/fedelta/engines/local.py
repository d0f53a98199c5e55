"""The in-process engine: clients of a round shared out to workers, all on one base model.

Messages are serialised as on a wire, so that bytes are measured and a client sees what a real one would.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedelta.client import Trainer
from fedelta.data import Examples, Shard
from fedelta.engines.observer import Observer
from fedelta.engines.prefixes import Prefixes
from fedelta.engines.workers import Result, Workers
from fedelta.errors import BadUpdate, ClientFailed, FedeltaError, in_one_line
from fedelta.intake import Reply
from fedelta.messages import ClientUpdate
from fedelta.packing import ByteCount, count_bytes
from fedelta.server import RoundOutcome, Server, ServerState
from fedelta.stopwatch import Stopwatch
from fedelta.tracking import RunFolder
from fedelta.training import predict, score
from fedelta.training.flops import count_texts


class LocalEngine:
    """Runs rounds until the configured number is done.

    Args:
        server: the rules.
        trainer: the model that every client borrows.
        shards: client → its rows.
        validation: the server's rows, on which the global model is followed.
        folder: where rounds and checkpoints go.
        observer: is told of progress.
        workers: where clients train and the global model is evaluated.
        stack: clients that train in one pass.
        prefix_cache: bytes of activations below the lowest adapter that may be kept.
    """

    def __init__(
        self,
        server: Server,
        trainer: Trainer,
        shards: Mapping[str, Shard],
        validation: Examples,
        folder: RunFolder,
        observer: Observer,
        workers: Workers,
        stack: int = 1,
        prefix_cache: float = 0.0,
    ) -> None:
        self.server = server
        self.trainer = trainer
        self.shards = shards
        self.validation = validation
        self.folder = folder
        self.observer = observer
        self.workers = workers
        self.stack = stack
        self.told: set[str] = set()
        # A stack goes through the whole model.
        self.prefixes = Prefixes(trainer.prefix, workers, validation, shards if stack == 1 else {}, prefix_cache)

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
        for rank in sorted({state.ranks[client] for client in clients}):
            # Workers are forked from this process: what all of them need is made here, once.
            self.trainer.model.prepare(rank)
        if self.trainer.prefix:
            self.prefixes.fill([self.shards[client].train for client in clients])
            watch.lap("prefix")

        def replies() -> Iterator[Reply]:
            stacks = [clients[begin : begin + self.stack] for begin in range(0, len(clients), self.stack)]
            costs = [sum(self.shards[client].cost for client in stack) for stack in stacks]
            results = self.workers.map(lambda i: self._train(state, stacks[i]), costs)
            for stack, result in zip(stacks, results, strict=True):
                watch.lap("clients")
                inside.add(result.facts["seconds"], result.facts["counts"])
                if (reason := result.facts.get("alone")) and reason not in self.told:
                    self.told.add(reason)
                    self.observer.warn(f"round {state.round}: {len(stack)} clients one by one: {reason}")
                blobs = iter(result.blobs)
                for client, facts in zip(stack, result.facts["clients"], strict=True):
                    down[client] = ByteCount(*facts["down"])
                    update = self._received(client, facts, blobs)
                    if isinstance(update, ClientUpdate):
                        up[client] = ByteCount(*facts["up"])
                    watch.lap("messages")
                    self.observer.client_done(client)
                    yield Reply(self.server.broadcast(state, client), update)
                    # Whatever ran since the reply was handed over is the server's folding it in.
                    watch.lap("aggregation")

        after, outcome = self.server.step(state, replies())
        for client, reason in outcome.skipped.items():
            self.observer.warn(f"round {state.round}: {client} skipped: {reason}")
        watch.lap("aggregation")
        self.trainer.catch_up(after.log.since(self.trainer.base.version))
        scores = self.evaluate(after, self.validation, "validation", inside) if evaluation_due else None
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

    def _train(self, state: ServerState, clients: Sequence[str]) -> Result:
        """The part of some clients in a round, in whichever process: bytes of each update, and what it keeps."""
        watch = self.trainer.watch = Stopwatch()
        facts: dict[str, Any] = {"clients": []}
        blobs: list[bytes] = []
        down = {client: self.server.broadcast(state, client).to_bytes() for client in clients}
        watch.lap("messages")
        together = self._together({c: down[c] for c in clients if not self.server.drops_out(state, c)}, facts)
        for client in clients:
            mine: dict[str, Any] = {"down": count_bytes(down[client])}
            try:
                if self.server.drops_out(state, client):
                    raise TimeoutError("dropped out")
                update = together.get(client) or self.trainer.answer(down[client], self.shards[client])
                mine["up"] = count_bytes(update)
                blobs += [update, self.trainer.kept_bytes(client)]
            except FedeltaError as error:
                mine["refused"] = error.reason if isinstance(error, BadUpdate) else str(error)
            except Exception as error:
                # A client may fail in any way; the round goes on without it, and says so.
                mine["failed"] = in_one_line(error)
            facts["clients"].append(mine)
        facts["seconds"], facts["counts"] = dict(watch.seconds), dict(watch.counts)
        return Result(facts, blobs)

    def _together(self, blobs: Mapping[str, bytes], facts: dict[str, Any]) -> Mapping[str, bytes]:
        """Updates of those that can train in one pass."""
        if len(blobs) < 2:
            return {}
        kept = dict(self.trainer.kept)
        try:
            updates = self.trainer.answer_together(list(blobs.values()), [self.shards[client] for client in blobs])
        except Exception as error:
            # One of them failed, and alone it will be seen which. The others start where they started.
            self.trainer.kept = kept
            self.trainer.watch.counts.clear()
            facts["alone"] = in_one_line(error)
            return {}
        if updates is None:
            facts["alone"] = "they can't be stacked"
            return {}
        return dict(zip(blobs, updates, strict=True))

    def _received(self, client: str, facts: Mapping[str, Any], blobs: Iterator[bytes]) -> ClientUpdate | Exception:
        """A client's reply out of what a worker gave."""
        if "failed" in facts:
            return ClientFailed(client, facts["failed"])
        if "refused" in facts:
            return BadUpdate(client, facts["refused"])
        update, kept = next(blobs), next(blobs)
        # Whatever becomes of the update: this client has kept it.
        self.trainer.take_kept(client, kept)
        try:
            return ClientUpdate.from_bytes(update, client)
        except BadUpdate as error:
            return error
        except FedeltaError as error:
            return BadUpdate(client, str(error))

    def evaluate(
        self, state: ServerState, examples: Examples, split: str, watch: Stopwatch | None = None
    ) -> dict[str, float]:
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
        self.prefixes.fill([examples])
        batches = list(examples.evaluation_order(self.trainer.evaluation_batch))
        model = self.trainer.model
        loaded = [0]

        def judge(task: int) -> Result:
            which, batch = divmod(task, len(batches))
            if which != loaded[0]:
                model.load(adapters[which], state.heads)
                loaded[0] = which
            losses, predictions = predict(model, self.trainer.tokenizer, examples, batches[batch], self.trainer.prefix)
            counted = count_texts([examples.length(row) for row in batches[batch]])
            counts = {f"evaluated_{name}": count for name, count in counted.items()}
            return Result({"losses": losses, "predictions": predictions, "counts": counts})

        # Workers inherit what is loaded; with one adapter a side, nothing is left to load.
        model.load(adapters[0], state.heads)
        costs = [float(len(rows) * max(examples.length(row) for row in rows)) for rows in batches] * len(adapters)
        found: list[tuple[list[float], list[int]]] = []
        for result in self.workers.map(judge, costs):
            found.append((result.facts["losses"], result.facts["predictions"]))
            if watch is not None:
                watch.add({}, result.facts["counts"])
            self.observer.evaluation_advanced(len(result.facts["losses"]))
        scores: Counter[str] = Counter()
        for begin in range(0, len(found), len(batches)):
            scores.update(score(examples, batches, found[begin : begin + len(batches)]))
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
