"""Means over seeds, and paired tests of two methods on the same seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Result of a paired t-test.

    Args:
        mean: mean of the differences.
        low, high: 95 % confidence interval of the mean, by Student's t.
        p: two-sided p value for a mean of zero.
        pairs: number of pairs.
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference | None:
    """Run the paired t-test of `ours` minus `theirs`.

    Args:
        ours, theirs: values under the same seeds, in the same order.

    Returns:
        The result; None for fewer than two pairs, or if all differences are equal.
    """
    from scipy import stats

    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    # Differences that are equal up to rounding have no spread, so there is no test.
    if len(differences) < 2 or stdev(differences) <= 1e-9 * max(map(abs, [*ours, *theirs])):
        return None
    test = stats.ttest_rel(ours, theirs)
    interval = test.confidence_interval(CONFIDENCE)
    return Difference(
        mean(differences), float(interval.low), float(interval.high), float(test.pvalue), len(differences)
    )


def p_value(difference: Difference) -> str:
    """Format the p value with three decimals."""
    return f"{difference.p:.3f}" if difference.p >= 0.0005 else "<0.001"


def interval(difference: Difference, factor: float = 1.0, digits: int = 2) -> str:
    """Format the confidence interval, multiplied by `factor`."""
    return f"{factor * difference.low:+.{digits}f} to {factor * difference.high:+.{digits}f}"


def deviation(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 for a single seed."""
    return stdev(values) if len(values) > 1 else 0.0


def spread(values: Sequence[float], factor: float = 1.0, digits: int = 2) -> str:
    """Format mean ± standard deviation over seeds, multiplied by `factor`; a dash without values."""
    if not values:
        return "–"
    text = f"{factor * mean(values):.{digits}f}"
    return f"{text} ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else text


def spread_of_small(values: Sequence[float]) -> str:
    """Format mean ± standard deviation over seeds of numbers of any size: `1.23e-04 ± 5.6e-06`."""
    if not values:
        return "–"
    text = f"{mean(values):.2e}"
    return f"{text} ± {stdev(values):.1e}" if len(values) > 1 else text
