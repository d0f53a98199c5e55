"""Scores of predictions, by kept libraries, and how people are shown them."""

from collections.abc import Sequence
from dataclasses import dataclass

from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


@dataclass(frozen=True)
class Metric:
    """A score that runs can be judged by.

    Args:
        name: its key among scores.
        title: what people call it.
        percent: whether it is shown times a hundred.
        lower: whether less is better.
    """

    name: str
    title: str
    percent: bool = True
    lower: bool = False

    @property
    def factor(self) -> float:
        """From a score to what is shown."""
        return 100.0 if self.percent else 1.0

    @property
    def digits(self) -> int:
        """That are shown; one more where it is no share."""
        return 2 if self.percent else 3

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title}, %" if self.percent else self.title

    def format(self, score: float, digits: int = 2) -> str:
        """Format a score with its unit: `digits` decimals for a percentage, one more otherwise."""
        return f"{100 * score:.{digits}f} %" if self.percent else f"{score:.{digits + 1}f}"

    def best(self, scores: Sequence[float]) -> float:
        return min(scores) if self.lower else max(scores)

    def reaches(self, score: float, target: float) -> bool:
        return score <= target if self.lower else score >= target

    def share(self, best: float, share: float) -> float:
        """A target somewhat short of the best: by 1 − share of its size, or as much more where less is better."""
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
    """`accuracy` and `macro_f1`, both from 0 to 1, and `matthews`, the correlation of Matthews, from −1 to 1."""
    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "macro_f1": float(f1_score(labels, predictions, average="macro")),
        "matthews": float(matthews_corrcoef(labels, predictions)),
    }


def regression_scores(labels: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """`pearson` and `spearman`, from −1 to 1; 0 where either side is constant, as no order is found there."""
    from scipy.stats import pearsonr, spearmanr

    if len(set(labels)) < 2 or len(set(predictions)) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(labels, predictions).statistic),
        "spearman": float(spearmanr(labels, predictions).statistic),
    }
