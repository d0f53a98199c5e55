"""To tell a number of a text, or of a pair: how similar two sentences are."""

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
    """One number a text; the loss is the mean squared error.

    Args:
        metric: by which runs are judged.
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

    def answers(self, logits: Tensor) -> list[Any]:
        return logits[:, 0].tolist()

    def own_scores(self, labels: Sequence[Any], answers: Sequence[Any]) -> dict[str, float]:
        return regression_scores(labels, answers)
