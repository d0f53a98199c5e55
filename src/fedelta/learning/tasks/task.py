"""What a task is: from rows to tokens with labels, and from a model's answers to scores."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedelta.learning.data import DataSettings
from fedelta.learning.data.examples import Examples
from fedelta.learning.model.activation_cache import ActivationCache, replayed
from fedelta.learning.model.lora_model import LoraModel
from fedelta.learning.tasks.metrics import METRICS, Metric
from fedelta.learning.training.loss import row_losses
from fedelta.settings import Settings


class Unit(NamedTuple):
    """A batch of an evaluation.

    Args:
        what: `answer`, one pass over the texts, or `generate`.
    """

    what: str
    rows: list[int]


Answer = list[Any]
"""What one text's part in the scores is computed from, as plain data: its summed loss, what that is summed over, and
what the task adds."""


class Task(Settings, ABC):
    """What a model learns to do. Subclasses are the task's settings too."""

    metric: str

    @property
    def judged(self) -> Metric:
        """The score that runs are judged by."""
        return METRICS[self.metric]

    def check_installed(self) -> None:
        """Before a run, and not after it.

        Raises:
            FedeltaError: naming a package that the task's scores need.
        """
        return

    @abstractmethod
    def columns(self, data: DataSettings) -> dict[str, bool]:
        """Column that is read → whether it must hold text."""

    @property
    def together(self) -> str | None:
        """Column whose rows of one value must not be parted by a draw."""
        return None

    def classes(self, data: DataSettings, splits: dict[str, Any]) -> list[str]:  # noqa: ARG002
        """Names of the classes, in the order of their index; none where there are none.

        Raises:
            FedeltaError: if the labels of these splits are not what the task is about.
        """
        return []

    @abstractmethod
    def examples(self, rows: Any, data: DataSettings, classes: Sequence[str], tokenizer: Any) -> Examples:
        """A `datasets.Dataset` as tokens with labels.

        Raises:
            FedeltaError: naming what can't be a label.
        """

    def units(self, examples: Examples, batch_size: int, final: bool) -> list[Unit]:  # noqa: ARG002
        """The batches of an evaluation; of the `final` one there may be more."""
        return passes(examples, batch_size)

    @torch.no_grad()
    def judge(
        self, model: LoraModel, tokenizer: Any, examples: Examples, unit: Unit, cache: ActivationCache | None = None
    ) -> list[Answer]:
        """What the loaded model makes of a batch, text by text."""
        model.peft.eval()
        batch = examples.batch(unit.rows, tokenizer, model.device)
        with replayed(cache, examples, unit.rows, batch):
            logits = model.peft(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
        losses, weights = row_losses(logits, batch["labels"])
        return [list(answer) for answer in zip(losses.tolist(), weights.tolist(), self.answers(logits), strict=True)]

    @abstractmethod
    def answers(self, logits: Tensor) -> list[Any]:
        """The answer to each text of a batch."""

    def score(self, examples: Examples, units: Sequence[Unit], found: Sequence[Sequence[Answer]]) -> dict[str, float]:
        """`loss`, a mean over all that is predicted, and the task's own scores."""
        passed = [(unit.rows, answers) for unit, answers in zip(units, found, strict=True) if unit.what == "answer"]
        rows = [row for batch, _ in passed for row in batch]
        answers = [answer for _, batch in passed for answer in batch]
        loss = math.fsum(answer[0] for answer in answers) / sum(answer[1] for answer in answers)
        return {"loss": loss, **self.own_scores([examples.labels[row] for row in rows], [a[2] for a in answers])}

    @abstractmethod
    def own_scores(self, labels: Sequence[Any], answers: Sequence[Any]) -> dict[str, float]:
        """Scores beside the loss."""

    def constant_score(self, train: Examples, test: Examples) -> float | None:  # noqa: ARG002
        """What always giving the same answer scores, where that says something."""
        return None


def passes(examples: Examples, batch_size: int) -> list[Unit]:
    """One pass over every text."""
    return [Unit("answer", rows) for rows in examples.evaluation_order(batch_size)]


def evaluate(task: Task, model: LoraModel, tokenizer: Any, examples: Examples, batch_size: int) -> dict[str, float]:
    """Scores of the loaded model, without anything that is generated."""
    units = passes(examples, batch_size)
    return task.score(examples, units, [task.judge(model, tokenizer, examples, unit) for unit in units])
