"""Regression: a number for a text or a pair of texts, such as the similarity of two sentences."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.learning.data import DataSettings
from fedelta.learning.data.examples import Examples, tokenize
from fedelta.learning.tasks.metrics import regression_scores
from fedelta.learning.tasks.task import Task


class Regression(Task):
    """Predict one number per text. The loss is the mean squared error.

    Args:
        metric: score by which runs are compared.
    """

    kind: Literal["regression"] = "regression"
    metric: Literal["pearson", "spearman", "loss"] = "pearson"

    def columns(self, data: DataSettings) -> dict[str, bool]:
        return dict.fromkeys(data.text_columns, True) | {data.label: False}

    def examples(self, rows: Any, data: DataSettings, classes: Sequence[str], tokenizer: Any) -> Examples:  # noqa: ARG002
        values = rows[data.label][:]
        wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v)]
        if wrong:
            raise FedeltaError(f"column {data.label!r} holds {wrong[0]!r}, expected numbers")
        return Examples(tokenize(rows, data.text_columns, tokenizer, data.max_length), [float(v) for v in values])

    def predictions(self, logits: Tensor) -> list[Any]:
        return logits[:, 0].tolist()

    def own_scores(self, labels: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        return regression_scores(labels, predictions)
