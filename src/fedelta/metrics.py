"""Scores of predictions, by scikit-learn."""

from collections.abc import Sequence

from sklearn.metrics import accuracy_score, f1_score


def classification_scores(labels: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """`accuracy` and `macro_f1`, both from 0 to 1."""
    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "macro_f1": float(f1_score(labels, predictions, average="macro")),
    }
