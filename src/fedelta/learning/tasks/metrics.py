"""Scores of predictions, computed by scikit-learn and SciPy, and their presentation."""

from collections.abc import Sequence
from dataclasses import dataclass

from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


@dataclass(frozen=True)
class Metric:
    """A score by which runs can be compared.

    Args:
        name: its key in a dict of scores.
        title: its name in tables and figures.
        percent: True if it is shown as a percentage.
        lower: True if lower values are better.
    """

    name: str
    title: str
    percent: bool = True
    lower: bool = False

    @property
    def factor(self) -> float:
        """Factor from a score to the number shown."""
        return 100.0 if self.percent else 1.0

    @property
    def digits(self) -> int:
        """Decimals shown: two for percentages, three otherwise."""
        return 2 if self.percent else 3

    @property
    def heading(self) -> str:
        """Title with the unit."""
        return f"{self.title}, %" if self.percent else self.title

    def format(self, score: float, digits: int = 2) -> str:
        """Format a score with its unit: `digits` decimals for a percentage, one more otherwise."""
        return f"{100 * score:.{digits}f} %" if self.percent else f"{score:.{digits + 1}f}"

    def best(self, scores: Sequence[float]) -> float:
        return min(scores) if self.lower else max(scores)

    def reaches(self, score: float, target: float) -> bool:
        return score <= target if self.lower else score >= target

    def share(self, best: float, share: float) -> float:
        """Target that reaches `share` of the best score: best·share, or best/share if that is the worse of the two."""
        return best * share if self.lower == (best < 0) else best / share


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy"),
        Metric("macro_f1", "macro F1"),
        Metric("matthews", "Matthews correlation"),
        Metric("pearson", "Pearson correlation"),
        Metric("spearman", "Spearman correlation"),
        Metric("loss", "loss", percent=False, lower=True),
        Metric("perplexity", "perplexity", percent=False, lower=True),
        Metric("bleu", "BLEU"),
        Metric("nist", "NIST", percent=False),
        Metric("meteor", "METEOR"),
        Metric("rouge_l", "ROUGE-L"),
        Metric("cider", "CIDEr", percent=False),
        Metric("exact", "exact answers"),
        Metric("exact_macro", "exact answers, mean of kinds"),
    )
}


def classification_scores(labels: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Compute `accuracy` and `macro_f1`, both in [0, 1], and `matthews`, Matthews' correlation, in [−1, 1]."""
    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "macro_f1": float(f1_score(labels, predictions, average="macro")),
        # scikit-learn also returns 0 for a single class, but warns about it.
        "matthews": float(matthews_corrcoef(labels, predictions)) if len({*labels, *predictions}) > 1 else 0.0,
    }


def regression_scores(labels: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """Compute `pearson` and `spearman`, in [−1, 1]; 0 if either side is constant, because it has no order then."""
    from scipy.stats import pearsonr, spearmanr

    if len(set(labels)) < 2 or len(set(predictions)) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(labels, predictions).statistic),
        "spearman": float(spearmanr(labels, predictions).statistic),
    }
