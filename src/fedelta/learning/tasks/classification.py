"""Classification of a text, or of a pair of texts."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.learning.data import DataSettings
from fedelta.learning.data.examples import Examples, tokenize
from fedelta.learning.tasks.metrics import classification_scores
from fedelta.learning.tasks.task import Task


class Classification(Task):
    """Predict one class per text, with a head on an encoder or a decoder.

    Args:
        metric: score by which runs are compared.
    """

    kind: Literal["classification"] = "classification"
    metric: Literal["accuracy", "macro_f1", "matthews", "loss"] = "accuracy"

    def columns(self, data: DataSettings) -> dict[str, bool]:
        return dict.fromkeys(data.text_columns, True) | {data.label: False}

    def classes(self, data: DataSettings, splits: dict[str, Any]) -> list[str]:
        feature = splits["train"].features[data.label]
        kind = str(getattr(feature, "dtype", "lists"))
        if not kind.startswith(("int", "uint", "string", "large_string", "bool")):
            raise FedeltaError(f"column {data.label!r} holds {kind}, expected classes: text or whole numbers")
        names = _present(splits["train"], data.label)
        for name in splits:
            unknown = [value for value in _present(splits[name], data.label) if value not in names]
            if unknown and not hasattr(feature, "names"):
                raise FedeltaError(
                    f"split {name} has the label {unknown[0]!r}, which no training row has; "
                    "name other splits by data.splits, or choose another data.split_seed"
                )
        if hasattr(feature, "names"):
            names = list(feature.names)
        if len(names) < 2:
            raise FedeltaError(f"column {data.label!r} holds one class only: {names}, expected at least two")
        return names

    def examples(self, rows: Any, data: DataSettings, classes: Sequence[str], tokenizer: Any) -> Examples:
        index = {name: i for i, name in enumerate(classes)}
        feature = rows.features[data.label]
        for name in _present(rows, data.label):
            if name not in index:
                known = ", ".join(classes[:10])
                raise FedeltaError(f"data source {data.source}: label {name!r} is not one of the server's ({known})")
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
    """Names of the labels that occur, in the order of their values."""
    return [_name(split.features[column], value) for value in sorted(set(split.unique(column)))]
