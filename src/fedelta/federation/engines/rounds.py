"""The rounds of a run, independent of how messages are carried: sample, step, evaluate, save."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fedelta.errors import BadUpdate, ClientFailed, FedeltaError, TooFewUpdates, in_one_line, one_line
from fedelta.federation.client import Trainer
from fedelta.federation.engines.evaluation import Evaluator
from fedelta.federation.engines.observer import Observer
from fedelta.federation.engines.round_record import round_record
from fedelta.federation.engines.traffic import Traffic
from fedelta.federation.records import Events
from fedelta.federation.reply import ClientReply
from fedelta.federation.run_folder import RunFolder
from fedelta.federation.server import Server, ServerState
from fedelta.learning.data import Examples
from fedelta.learning.device import DeviceError
from fedelta.learning.tasks import Answer
from fedelta.learning.training.stopwatch import Stopwatch
from fedelta.protocol.failures import FAILURE, read_failure
from fedelta.protocol.messages import ClientUpdate
from fedelta.seeds import derive_seed


class Draw(NamedTuple):
    """The clients drawn for one attempt at a round.

    Args:
        clients: the sampled clients, in the order in which their updates are aggregated.
        absent: sampled clients that are simulated to drop out after the download.
        attempt: number of earlier attempts at this round.
    """

    clients: Sequence[str]
    absent: frozenset[str]
    attempt: int


def read_update(client: str, facts: Mapping[str, Any], blob: bytes) -> ClientUpdate | Exception:
    """Read an update, or the reason why there is none.

    Args:
        client: the client that must have sent it.
        facts: facts sent along with the update. If there is no update, they say why: `refused` or `failed` within one
            process, the kind of failure from a site.
        blob: a serialized `ClientUpdate`.

    Returns:
        The update, `BadUpdate` if it can't be used, or `ClientFailed` if the client failed.
    """
    if FAILURE in facts:
        return read_failure(client, facts)
    if "failed" in facts:
        return ClientFailed(client, one_line(facts["failed"]))
    if "refused" in facts:
        return BadUpdate(client, one_line(facts["refused"]))
    try:
        return ClientUpdate.from_bytes(blob, client)
    except BadUpdate as error:
        return error
    except Exception as error:
        # A damaged blob may raise anything. It must exclude only its sender from the round.
        return BadUpdate(client, in_one_line(error))


def explain(error: Exception) -> dict[str, str]:
    """Describe an error of a client in this run's own processes as the facts that `read_update` reads."""
    if isinstance(error, BadUpdate):
        return {"refused": error.reason}
    if isinstance(error, DeviceError):
        # The update is not bad: the client's machine is too small.
        return {"failed": str(error)}
    # A client may fail in any way. The round continues without it and records the reason.
    return {"refused": str(error)} if isinstance(error, FedeltaError) else {"failed": in_one_line(error)}


@dataclass(frozen=True, eq=False)
class EngineContext:
    """The parts of a run that every engine needs.

    Args:
        server: the rules of the run.
        trainer: the server's own model, used for evaluation.
        evaluator: evaluates the global model.
        validation: the server's validation split; the global model is evaluated on it during the run.
        folder: receives rounds and checkpoints.
        observer: notified of progress.
    """

    server: Server
    trainer: Trainer
    evaluator: Evaluator
    validation: Examples
    folder: RunFolder
    observer: Observer


class Engine(ABC):
    """Runs the rounds of a run: samples clients, passes their replies to `Server.step`, evaluates and saves.

    Subclasses carry the messages to the clients and back in `replies`. A round with too few usable updates is tried
    again with newly sampled clients, up to `federation.attempts` times.

    Args:
        context: the parts of the run.

    Attributes:
        evaluated_client_rounds: number of rounds, from the first, in which each client's own model is evaluated.
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
    """Whether to sample more clients than `federation.keep`, because some may be late."""

    @abstractmethod
    def replies(self, state: ServerState, draw: Draw, watch: Stopwatch, inside: Stopwatch) -> Iterator[ClientReply]:
        """Train the drawn clients and yield one reply per client, in the order of `draw.clients`.

        A client that drops out or fails also has a reply, with the error in place of the update.

        Args:
            state: the state before the round.
            draw: the clients of this attempt.
            watch: counts the seconds of the phases `clients` and `messages` in this process.
            inside: counts the seconds of each phase inside workers.
        """

    def update_clients(self, state: ServerState) -> ServerState:
        """Add the clients that have joined since the last round to the state, and remove those that have left."""
        return state

    def events(self) -> Events:
        """Return the engine's keys for the round's line of `rounds.jsonl`, and start counting for the next round."""
        return {"late": {}, "bytes_late": 0, "caught_up": {}}

    def run(
        self, state: ServerState, rounds: int, evaluate_every: int, evaluated_client_rounds: int = 0
    ) -> ServerState:
        """Run the remaining rounds.

        Args:
            state: a new state or one from a checkpoint.
            rounds: number of rounds of the whole run.
            evaluate_every: the global model is evaluated every `evaluate_every` rounds and after the last.
            evaluated_client_rounds: number of rounds, from the first, in which each client's own model is evaluated.

        Returns:
            The state after the last round.

        Raises:
            TooFewUpdates: if all attempts at a round have too few usable updates.
        """
        self.evaluated_client_rounds = evaluated_client_rounds
        # After a resume the shared base has no patches, but clients that were up to date expect them.
        self.trainer.catch_up(state.log.since(self.trainer.base.version))
        while state.round < rounds:
            state = self.update_clients(state)
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
                self.observer.warn(f"{error}; trying the round again")
        for client, reason in outcome.skipped.items():
            self.observer.warn(f"round {state.round}: {client} skipped: {reason}")
        watch.lap("aggregation")
        # Evaluate clients before the round's patch is folded, on the base that they trained on.
        own = {r.client: self._evaluate_client(state, r) for r in used if r.client in outcome.contributors}
        self.trainer.catch_up(after.log.since(self.trainer.base.version))
        answers: list[Answer] = []
        scores = None
        if evaluation_due:
            scores = self.evaluator.evaluate(after, self.validation, "validation", inside, answers)
        watch.lap("evaluation")
        record = round_record(
            state, after, outcome, scores, traffic, self.trainer.task.metric, failed, own, self.events()
        )
        timing = {
            "round": state.round,
            "seconds": dict(watch.seconds),
            "in_workers": dict(inside.seconds),
            "counts": dict(inside.counts),
        }
        self.folder.finish_round(after, self.trainer.kept, self.trainer.error_feedback, record, timing, answers)
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
            # If clients keep factors of their own, an update is not a complete model.
            if state.round < self.evaluated_client_rounds and not self.server.method.personal:
                used.append(reply)
            watch.lap("messages")
            self.observer.client_done(reply.client)
            yield reply._replace(loss=self._loss(state, reply))
            # The time since the yield is the server's: it has aggregated the update.
            watch.lap("aggregation")

    def _evaluate_client(self, state: ServerState, reply: ClientReply) -> dict[str, float | None]:
        assert isinstance(reply.update, ClientUpdate)
        scores = self.evaluator.evaluate_client(state, reply.sent, reply.update, self.validation)
        # Evaluating a client must not end the run, so scores that are not finite become None.
        finite = {name: value if math.isfinite(value) else None for name, value in scores.items()}
        return {"rank": reply.update.rank, **finite}

    def _loss(self, state: ServerState, reply: ClientReply) -> float | None:
        """Measure the loss of a client's model on the server's rows, if it decides the client's rank; else None."""
        ranks, update = self.server.ranks, reply.update
        if ranks.loss_on == "own" or not self.server.needs_first_loss(state, reply.client):
            return None
        if not isinstance(update, ClientUpdate):
            return None
        try:
            loss = self.evaluator.evaluate_client(state, reply.sent, update, self._loss_rows)["loss"]
        except BadUpdate:
            return None  # the server refuses this update later
        return loss if math.isfinite(loss) else None
