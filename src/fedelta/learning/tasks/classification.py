"""Classification of a text, or of a pair of texts."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.learning.data import Columns, DataSettings
from fedelta.learning.data.examples import Examples, tokenize
from fedelta.learning.data.labels import class_order
from fedelta.learning.data.table import listed, say, shorten
from fedelta.learning.model.base_model import ModelKind
from fedelta.learning.tasks.metrics import classification_scores
from fedelta.learning.tasks.task import Task, labeled_texts


class Classification(Task):
    """Predict one class per text, with a head on an encoder or a decoder.

    Args:
        metric: score by which runs are compared.
    """

    model_kind: ClassVar[ModelKind] = "classification"
    kind: Literal["classification"] = "classification"
    metric: Literal["accuracy", "macro_f1", "matthews", "loss"] = "accuracy"

    def columns(self, data: DataSettings) -> Columns:
        return labeled_texts(data, "class")

    def classes(self, data: DataSettings, splits: dict[str, Any]) -> list[str]:
        feature = splits["train"].features[data.label]
        present = {name: _present(split, data.label) for name, split in splits.items()}
        names = list(feature.names) if hasattr(feature, "names") else present["train"]
        if len(names) < 2:
            raise FedeltaError(f"column {data.label!r} holds one class only: {names}, expected at least two")
        for split, found in present.items():
            unknown = [name for name in found if name not in names]
            if unknown:
                raise FedeltaError(
                    f"split {split} has the label {shorten(unknown[0], 40)!r}, which no training row has; "
                    "set data.stratify: true, a larger data.limit, or other splits in data.splits"
                )
        if lacking := {
            split: missing for split in splits if (missing := [n for n in names if n not in present[split]])
        }:
            say("data: " + "; ".join(f"no row of {split} has the class {listed(m, 4)}" for split, m in lacking.items()))
        return names

    def examples(self, rows: Any, data: DataSettings, classes: Sequence[str], tokenizer: Any) -> Examples:
        index = {name: i for i, name in enumerate(classes)}
        feature = rows.features[data.label]
        for name in _present(rows, data.label):
            if name not in index:
                raise FedeltaError(
                    f"data source {shorten(data.title, 80, end=True)}: label {shorten(name, 40)!r} is not one of the "
                    f"server's ({listed(classes, 5, 20)})"
                )
        labels = [index[_name(feature, value)] for value in rows[data.label][:]]
        return Examples(tokenize(rows, data.text_columns, tokenizer, data.max_length), labels)

    def predictions(self, logits: Tensor) -> list[Any]:
        return logits.argmax(-1).tolist()

    def own_scores(self, labels: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        return classification_scores(labels, predictions)

    def constant_score(self, train: Examples, test: Examples) -> float | None:
        """Test accuracy of a model that always predicts the most frequent training label."""
        if self.metric != "accuracy":
            return None
        majority = max(set(train.labels), key=list(train.labels).count)
        return list(test.labels).count(majority) / len(test)


def _name(feature: Any, value: Any) -> str:
    return feature.names[value] if hasattr(feature, "names") else str(value)


def _present(split: Any, column: str) -> list[str]:
    """Names of the labels that occur, in their order."""
    feature = split.features[column]
    if hasattr(feature, "names"):
        return [feature.names[value] for value in sorted(split.unique(column))]
    return class_order(split.unique(column))
