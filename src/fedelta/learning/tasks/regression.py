"""Regression: a number for a text or a pair of texts, such as the similarity of two sentences."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from fedelta.learning.data import Columns, DataSettings
from fedelta.learning.data.examples import Examples, tokenize
from fedelta.learning.model.base_model import ModelKind
from fedelta.learning.tasks.metrics import regression_scores
from fedelta.learning.tasks.task import Task, labeled_texts


class Regression(Task):
    """Predict one number per text. The loss is the mean squared error.

    Args:
        metric: score by which runs are compared.
    """

    model_kind: ClassVar[ModelKind] = "regression"
    kind: Literal["regression"] = "regression"
    metric: Literal["pearson", "spearman", "loss"] = "pearson"

    def columns(self, data: DataSettings) -> Columns:
        return labeled_texts(data, "number")

    def examples(self, rows: Any, data: DataSettings, classes: Sequence[str], tokenizer: Any) -> Examples:  # noqa: ARG002
        return Examples(tokenize(rows, data.text_columns, tokenizer, data.max_length), list(rows[data.label][:]))

    def predictions(self, logits: Tensor) -> list[Any]:
        return logits[:, 0].tolist()

    def own_scores(self, labels: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        return regression_scores(labels, predictions)
