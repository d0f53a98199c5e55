"""Interface of a task: it turns rows into tokens with labels, and a model's predictions into scores."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fedelta.learning.data import Columns, DataSettings
from fedelta.learning.data.examples import Examples
from fedelta.learning.data.settings import Use
from fedelta.learning.model.activation_cache import ActivationCache, replayed
from fedelta.learning.model.base_model import ModelKind
from fedelta.learning.model.lora_model import LoraModel
from fedelta.learning.tasks.metrics import METRICS, Metric
from fedelta.learning.training.loss import row_losses
from fedelta.settings import Settings


class Unit(NamedTuple):
    """One batch of an evaluation.

    Args:
        kind: `forward`, one forward pass over the texts, or `generate`.
        rows: rows of the batch.
    """

    kind: str
    rows: list[int]


Outcome = list[Any]
"""Result of evaluating one text, as plain data.

After a forward pass: its summed loss, the number of terms in that sum, and its prediction. After generation: the text.
"""


class Answer(NamedTuple):
    """An answer that an evaluation has generated.

    Args:
        row: row of the split.
        prompt: text that the model saw, with special tokens.
        text: the answer, as it is compared.
        references: texts that it is compared with.
        exact: whether it is an exact answer; None if these are not counted.
        client: client whose model answered; None for the global model.
    """

    row: int
    prompt: str
    text: str
    references: list[str]
    exact: bool | None = None
    client: str | None = None


class Task(Settings, ABC):
    """A kind of problem that a model learns. A subclass also holds the task's settings.

    Class attributes:
        model_kind: the kind of model that learns it.
    """

    model_kind: ClassVar[ModelKind]
    metric: str

    @property
    def judged(self) -> Metric:
        """The score by which runs are compared."""
        return METRICS[self.metric]

    def check_installed(self) -> None:
        """Check the packages that the task's scores need, so that a run fails early.

        Raises:
            FedeltaError: naming the package that is missing.
        """
        return

    def with_template(self, tokenizer: Any) -> Any:
        """The tokenizer with the task's own chat template, if it has one."""
        return tokenizer

    @abstractmethod
    def columns(self, data: DataSettings) -> Columns:
        """Columns to read, what each is used for, and which cells must not be empty."""

    @property
    def together(self) -> str | None:
        """Column that defines groups: no draw separates rows with the same value. None means no groups."""
        return None

    def classes(self, data: DataSettings, splits: dict[str, Any]) -> list[str]:  # noqa: ARG002
        """Names of the classes by index; empty if the task has no classes.

        Raises:
            FedeltaError: if the labels of these splits do not fit the task.
        """
        return []

    @abstractmethod
    def examples(self, rows: Any, data: DataSettings, classes: Sequence[str], tokenizer: Any) -> Examples:
        """Turn a `datasets.Dataset` into tokens with labels.

        Raises:
            FedeltaError: naming the value that can't be a label.
            RefusedRow: if a row can't become tokens.
        """

    def units(self, examples: Examples, batch_size: int, final: bool) -> list[Unit]:  # noqa: ARG002
        """Batches of an evaluation. The `final` one may have additional batches."""
        return passes(examples, batch_size)

    @torch.no_grad()
    def evaluate_batch(
        self, model: LoraModel, tokenizer: Any, examples: Examples, unit: Unit, cache: ActivationCache | None = None
    ) -> list[Outcome]:
        """Evaluate the loaded model on one batch, and return the outcome of each text."""
        model.peft.eval()
        batch = examples.batch(unit.rows, tokenizer, model.device)
        with replayed(cache, examples, unit.rows, batch):
            logits = model.peft(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
        losses, weights = row_losses(logits, batch["labels"])
        return [list(row) for row in zip(losses.tolist(), weights.tolist(), self.predictions(logits), strict=True)]

    @abstractmethod
    def predictions(self, logits: Tensor) -> list[Any]:
        """Prediction for each text of a batch, from its logits (texts, …)."""

    def score(
        self, examples: Examples, units: Sequence[Unit], outcomes: Sequence[Sequence[Outcome]]
    ) -> dict[str, float]:
        """Compute `loss`, the mean over everything that is predicted, and the task's own scores."""
        forward = [(unit.rows, batch) for unit, batch in zip(units, outcomes, strict=True) if unit.kind == "forward"]
        labels = [examples.labels[row] for rows, _ in forward for row in rows]
        texts = [outcome for _, batch in forward for outcome in batch]
        loss = math.fsum(outcome[0] for outcome in texts) / sum(outcome[1] for outcome in texts)
        return {"loss": loss, **self.own_scores(labels, [outcome[2] for outcome in texts])}

    @abstractmethod
    def own_scores(self, labels: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        """Compute the scores besides the loss."""

    def answers(
        self,
        tokenizer: Any,  # noqa: ARG002
        examples: Examples,  # noqa: ARG002
        units: Sequence[Unit],  # noqa: ARG002
        outcomes: Sequence[Sequence[Outcome]],  # noqa: ARG002
        limit: int,  # noqa: ARG002
    ) -> list[Answer]:
        """The first `limit` answers that an evaluation has generated, by row; none if the task generates no text."""
        return []

    def constant_score(self, train: Examples, test: Examples) -> float | None:  # noqa: ARG002
        """Score of a model that always gives the same prediction; None if that is not informative."""
        return None


def labeled_texts(data: DataSettings, use: Use) -> Columns:
    """The text columns and the label. None of their cells may be empty."""
    uses: dict[str, Use] = dict.fromkeys(data.text_columns, "text")
    return Columns({**uses, data.label: use}, tuple((column,) for column in [*data.text_columns, data.label]))


def passes(examples: Examples, batch_size: int) -> list[Unit]:
    """Batches of one forward pass over every text."""
    return [Unit("forward", rows) for rows in examples.evaluation_order(batch_size)]


def evaluate(task: Task, model: LoraModel, tokenizer: Any, examples: Examples, batch_size: int) -> dict[str, float]:
    """Compute the loaded model's scores, without those that need generated text."""
    units = passes(examples, batch_size)
    return task.score(examples, units, [task.evaluate_batch(model, tokenizer, examples, unit) for unit in units])
