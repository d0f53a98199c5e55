"""The server's evaluation of the global model, its batches shared out to workers."""

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.federation.client import Trainer
from fedelta.federation.engines.activation_caches import ActivationCaches
from fedelta.federation.engines.observer import Observer
from fedelta.federation.engines.workers import Result, Workers
from fedelta.federation.server import Server, ServerState
from fedelta.learning.data import Examples
from fedelta.learning.device import device_errors
from fedelta.learning.tasks import Outcome
from fedelta.learning.training.flops import count_texts
from fedelta.learning.training.stopwatch import Stopwatch
from fedelta.lora.adapter import Adapter
from fedelta.protocol.messages import Broadcast, ClientUpdate
from fedelta.protocol.validation import receive

Scores = dict[str, float]


class Evaluator:
    """Scores of the model that a state stands for.

    Args:
        server: the rules.
        trainer: whose model and base are used.
        workers: among which batches are shared out.
        observer: is told of progress.
        caches: what need not be computed again.
    """

    def __init__(
        self, server: Server, trainer: Trainer, workers: Workers, observer: Observer, caches: ActivationCaches
    ) -> None:
        self.server = server
        self.trainer = trainer
        self.workers = workers
        self.observer = observer
        self.caches = caches

    def evaluate(self, state: ServerState, examples: Examples, split: str, watch: Stopwatch | None = None) -> Scores:
        """Scores of the global model: base with all patches, adapter at rank R, heads.

        Where clients keep factors of their own there is no such model: the mean of the scores of each client's own.
        """
        if self.trainer.base.version != state.log.version:
            raise FedeltaError(f"base is at version {self.trainer.base.version}, the server at {state.log.version}")
        if self.server.method.personal:
            adapters = list(self.server.personal_adapters(state, self.trainer.kept).values())
        else:
            adapters = [state.method.adapter.with_scale(self.server.scale(state.method.adapter.rank))]
        return self._judge(adapters, state.heads, examples, split, watch)

    def evaluate_client(self, state: ServerState, sent: Broadcast, update: ClientUpdate, examples: Examples) -> Scores:
        """Scores of the model that one client has after its training: its own adapter, heads and tail.

        Args:
            state: that it was sent from, whose base this is.

        Raises:
            BadUpdate: if the update does not answer the broadcast.
        """
        own = receive(update, sent, state.log.shapes)
        with self.trainer.with_tail(sent.tail):
            return self._judge([own.adapter], own.heads, examples, own.client, None)

    def _judge(
        self,
        adapters: Sequence[Adapter],
        heads: Mapping[str, Tensor],
        examples: Examples,
        split: str,
        watch: Stopwatch | None,
    ) -> Scores:
        """Mean scores of these adapters, each with the same heads, on the base as it is."""
        task, tokenizer = self.trainer.task, self.trainer.tokenizer
        units = task.units(examples, self.trainer.evaluation_batch, final=split == "test")
        self.observer.evaluation_started(split, sum(len(unit.rows) for unit in units) * len(adapters))
        self.caches.fill([examples])
        model = self.trainer.model
        loaded = [0]

        def judge(place: int) -> Result:
            which, number = divmod(place, len(units))
            unit = units[number]
            if which != loaded[0]:
                model.load(adapters[which], heads)
                loaded[0] = which
            lower = "task.generate.batch_size" if unit.kind == "generate" else "evaluation.batch_size"
            with device_errors(f"the model is evaluated ({split})", [f"lower {lower} (now {len(unit.rows)})"]):
                outcomes = task.evaluate_batch(model, tokenizer, examples, unit, self.trainer.activation_cache)
            counted = count_texts([examples.length(row) for row in unit.rows])
            counts = {f"evaluated_{name}": count for name, count in counted.items()}
            return Result({"outcomes": outcomes, "counts": counts})

        # Workers inherit what is loaded; with one adapter a side, nothing is left to load.
        model.load(adapters[0], heads)
        costs = [float(len(unit.rows) * max(map(examples.length, unit.rows))) for unit in units] * len(adapters)
        outcomes: list[list[Outcome]] = []
        for result in self.workers.map(judge, costs):
            outcomes.append(result.facts["outcomes"])
            if watch is not None:
                watch.add({}, result.facts["counts"])
            self.observer.evaluation_advanced(len(result.facts["outcomes"]))
        scores: Counter[str] = Counter()
        for begin in range(0, len(outcomes), len(units)):
            scores.update(task.score(examples, units, outcomes[begin : begin + len(units)]))
        return {name: total / len(adapters) for name, total in scores.items()}
