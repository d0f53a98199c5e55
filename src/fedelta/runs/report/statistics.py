"""Means over seeds, and tests of one method against another on the same seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """One against another, pair by pair.

    Args:
        mean: of the differences.
        low, high: its 95 % confidence interval by Student's t.
        p: two-sided, that the mean of such differences is zero (paired t-test).
        pairs: their number.
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference | None:
    """The paired t-test; None where there are fewer than two pairs, or all differences are the same.

    Args:
        ours, theirs: of the same seeds in the same order.
    """
    from scipy import stats

    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    # Differences that are equal up to rounding have no spread to test against.
    if len(differences) < 2 or stdev(differences) <= 1e-9 * max(map(abs, [*ours, *theirs])):
        return None
    test = stats.ttest_rel(ours, theirs)
    interval = test.confidence_interval(CONFIDENCE)
    return Difference(
        mean(differences), float(interval.low), float(interval.high), float(test.pvalue), len(differences)
    )


def p_value(found: Difference) -> str:
    """To three digits."""
    return f"{found.p:.3f}" if found.p >= 0.0005 else "<0.001"


def interval(found: Difference, factor: float = 1.0, digits: int = 2) -> str:
    """The confidence interval as text."""
    return f"{factor * found.low:+.{digits}f} to {factor * found.high:+.{digits}f}"


def deviation(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 of a single one."""
    return stdev(values) if len(values) > 1 else 0.0


def spread(values: Sequence[float], factor: float = 1.0, digits: int = 2) -> str:
    """Mean ± standard deviation over seeds, as text; a dash for nothing."""
    if not values:
        return "–"
    text = f"{factor * mean(values):.{digits}f}"
    return f"{text} ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else text


def spread_of_small(values: Sequence[float]) -> str:
    """The same for numbers of any size: 1.23e-04 ± 5.6e-06."""
    if not values:
        return "–"
    text = f"{mean(values):.2e}"
    return f"{text} ± {stdev(values):.1e}" if len(values) > 1 else text
