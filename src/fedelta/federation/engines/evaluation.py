"""Evaluation of the global model and of clients' models on the server, with batches distributed over workers."""

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.federation.client import Trainer
from fedelta.federation.engines.activation_caches import ActivationCaches
from fedelta.federation.engines.observer import Observer
from fedelta.federation.engines.workers import Result, Workers
from fedelta.federation.server import Server, ServerState
from fedelta.learning.data import Examples
from fedelta.learning.device import device_errors
from fedelta.learning.tasks import Answer, Outcome
from fedelta.learning.training.flops import count_texts
from fedelta.learning.training.stopwatch import Stopwatch
from fedelta.lora.adapter import Adapter
from fedelta.protocol.messages import Broadcast, ClientUpdate
from fedelta.protocol.validation import receive

Scores = dict[str, float]
MAX_ANSWERS = 500
"""Maximum number of generated answers that one evaluation keeps; of each client at least one."""


class Evaluator:
    """Computes scores of the global model and of single clients' models.

    Args:
        server: the rules of the run.
        trainer: its model, base patches and tokenizer are used.
        workers: workers that evaluate the batches.
        observer: notified of progress.
        caches: cached activations.
    """

    def __init__(
        self, server: Server, trainer: Trainer, workers: Workers, observer: Observer, caches: ActivationCaches
    ) -> None:
        self.server = server
        self.trainer = trainer
        self.workers = workers
        self.observer = observer
        self.caches = caches

    def evaluate(
        self,
        state: ServerState,
        examples: Examples,
        split: str,
        watch: Stopwatch | None = None,
        answers: list[Answer] | None = None,
    ) -> Scores:
        """Evaluate the global model: the base with all patches, the adapter at rank R, and the heads.

        If clients keep factors of their own, there is no global model. The scores are then the means of the scores of
        all clients' models. Before the first round, all of these are the initial model.

        Args:
            state: the server's state; the trainer's base must be at its version.
            examples: the rows to evaluate on.
            split: name of the split, such as "validation".
            watch: counts the evaluated texts and tokens, if given.
            answers: receives the first generated answers, if given.

        Raises:
            FedeltaError: if the base is at another version than the state.
        """
        if self.trainer.base.version != state.log.version:
            raise FedeltaError(
                f"the base is at version {self.trainer.base.version}, but the server is at version {state.log.version}"
            )
        adapters: dict[str | None, Adapter] = {}
        if self.server.method.personal and state.round > 0:
            adapters.update(self.server.personal_adapters(state, self.trainer.kept))
        else:
            # Before round 0 there is one model for all clients.
            adapters[None] = state.method.adapter.with_scale(self.server.scale(state.method.adapter.rank))
        return self._score(adapters, state.heads, examples, split, watch, answers)

    def evaluate_client(self, state: ServerState, sent: Broadcast, update: ClientUpdate, examples: Examples) -> Scores:
        """Evaluate one client's model after its training: its own adapter, heads and tail.

        Args:
            state: the state that the broadcast was written from; the trainer's base must be at its version.
            sent: the broadcast to the client.
            update: the client's update.
            examples: the rows to evaluate on.

        Raises:
            BadUpdate: if the update does not match the broadcast.
        """
        own = receive(update, sent, state.log.shapes)
        with self.trainer.with_tail(sent.tail):
            return self._score({own.client: own.adapter}, own.heads, examples, own.client)

    def _score(
        self,
        models: Mapping[str | None, Adapter],
        heads: Mapping[str, Tensor],
        examples: Examples,
        split: str,
        watch: Stopwatch | None = None,
        answers: list[Answer] | None = None,
    ) -> Scores:
        """Average the scores of several adapters by client, each with the same heads, on the current base."""
        task, tokenizer, adapters = self.trainer.task, self.trainer.tokenizer, list(models.values())
        units = task.units(examples, self.trainer.evaluation_batch, final=split == "test")
        self.observer.evaluation_started(split, sum(len(unit.rows) for unit in units) * len(adapters))
        self.caches.fill([examples])
        model = self.trainer.model
        loaded = [0]

        def evaluate_unit(i: int) -> Result:
            adapter_index, unit_index = divmod(i, len(units))
            unit = units[unit_index]
            if adapter_index != loaded[0]:
                model.load(adapters[adapter_index], heads)
                loaded[0] = adapter_index
            lower = "task.generate.batch_size" if unit.kind == "generate" else "evaluation.batch_size"
            with device_errors(f"the model is evaluated ({split})", [f"lower {lower} (now {len(unit.rows)})"]):
                outcomes = task.evaluate_batch(model, tokenizer, examples, unit, self.trainer.activation_cache)
            counted = count_texts([examples.length(row) for row in unit.rows])
            counts = {f"evaluated_{name}": count for name, count in counted.items()}
            return Result({"outcomes": outcomes, "counts": counts})

        # Forked workers inherit the loaded adapter. With a single adapter, they have nothing to load.
        model.load(adapters[0], heads)
        costs = [float(len(unit.rows) * max(map(examples.length, unit.rows))) for unit in units] * len(adapters)
        outcomes_by_unit: list[list[Outcome]] = []
        for result in self.workers.map(evaluate_unit, costs):
            outcomes_by_unit.append(result.facts["outcomes"])
            if watch is not None:
                watch.add({}, result.facts["counts"])
            self.observer.evaluation_advanced(len(result.facts["outcomes"]))
        scores: Counter[str] = Counter()
        for number, client in enumerate(models):
            own = outcomes_by_unit[number * len(units) : (number + 1) * len(units)]
            scores.update(task.score(examples, units, own))
            if answers is not None:
                found = task.answers(tokenizer, examples, units, own, max(1, MAX_ANSWERS // len(models)))
                answers += [answer._replace(client=client) for answer in found]
        return {name: total / len(adapters) for name, total in scores.items()}
