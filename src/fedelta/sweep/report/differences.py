"""Differences of each row to the baseline, by the values of the other axes and by round."""

from collections.abc import Sequence
from functools import partial

import pandas as pd

from fedelta.learning.tasks.metrics import Metric
from fedelta.runs.report.statistics import Difference, interval, p_value, paired, spread
from fedelta.runs.report.text_table import TextTable
from fedelta.sweep.report.results import (
    LATE,
    Measure,
    Panel,
    Results,
    final_score,
    first_validation,
    late_validation,
)
from fedelta.sweep.results import Row, evaluations


def panel_means(values: pd.DataFrame, row: str, panels: Sequence[Panel]) -> pd.Series:
    """Average a row over panels, seed by seed.

    Args:
        values: a measure as `Results.by_seed` gives it.

    Returns:
        Seed → mean, for the seeds with a value in every one of the panels.
    """
    return values.loc[[(row, panel) for panel in panels]].mean(skipna=False).dropna()


def difference(results: Results, values: pd.DataFrame, row: str, panels: Sequence[Panel]) -> Difference | None:
    """Test a row against the baseline by pairs of seeds, each seed's mean over these panels.

    Panels under one seed share shards, sampling and test texts, so they are not independent pairs.

    Args:
        values: a measure as `Results.by_seed` gives it.
    """
    if row == results.baseline or results.baseline not in results.rows:
        return None
    ours, theirs = (panel_means(values, name, panels) for name in (row, results.baseline))
    pairs = pd.concat([ours, theirs], axis=1, join="inner").sort_index()
    return paired(*(list(pairs[side]) for side in pairs))


def one_scale(results: Results) -> bool:
    """Whether scores of all panels can be averaged: they have the same scale and direction."""
    return len({(metric.factor, metric.lower) for metric in results.metrics}) == 1


def measures(results: Results) -> dict[str, Measure]:
    """The measures that are compared, by heading."""
    first = results.evaluations().groupby(["row", "panel", "seed"])["round"].min()
    after = ", ".join(map(str, sorted(set(first))))
    return {f"after round {after}": first_validation, "late": late_validation, "test": final_score}


def over_rounds(results: Results, row: str) -> dict[int, Difference | None]:
    """Compare a row's validation score with the baseline's after each evaluated round, over all panels.

    Returns:
        Finished rounds → difference; empty where scores of the panels cannot be averaged.
    """
    if not one_scale(results):
        return {}
    numbers = sorted(map(int, set(results.evaluations()["round"])))
    tables = {number: results.by_seed(partial(_validation_after, number)) for number in numbers}
    return {number: difference(results, values, row, results.panels) for number, values in tables.items()}


def _validation_after(number: int, row: Row) -> float | None:
    return dict(evaluations(row)).get(number)


def by_round(results: Results) -> TextTable:
    """Tabulate the differences to the baseline round by round, over all panels."""
    others = [row for row in results.rows if row != results.baseline]
    baseline = results.label(results.baseline)
    by_number = [over_rounds(results, row) for row in others]
    numbers = by_number[0] if by_number else ()
    lines = [[str(r), *(_text(differences[r], results.metrics[0]) for differences in by_number)] for r in numbers]
    note = (
        f"Validation scores less those of {baseline}, in units of the scores: mean over all columns, 95 % interval and "
        "p of a paired t-test over seeds, not corrected for their number."
    )
    head = ["after round", *map(results.label, others)]
    name, title = f"{results.name}-difference-by-round", f"{results.title}: differences to {baseline} by round"
    return TextTable(name, title, head, lines, note)


def by_axis(results: Results) -> TextTable:
    """Tabulate, for each value of each other axis, the differences to the baseline over all panels with that value."""
    others = [row for row in results.rows if row != results.baseline]
    compared = {heading: results.by_seed(measure) for heading, measure in measures(results).items()}
    baseline = results.label(results.baseline)
    deviations = results.mean_deviation("relative")
    measured = bool(_baseline_deviation(results, deviations, results.panels))
    head = ["columns", *([f"{baseline}: deviation, %"] if measured else [])]
    head += [f"{results.label(row)}, {heading}" for row in others for heading in compared]
    lines = []
    for label, panels in _groups(results) if one_scale(results) else []:
        line = [label]
        if measured:
            line.append(spread(_baseline_deviation(results, deviations, panels), 100))
        for row in others:
            for values in compared.values():
                line.append(_text(difference(results, values, row, panels), results.metrics[0]))
        lines.append(line)
    note = (
        f"Differences to {baseline} in the first validation, in the mean of the last {LATE:.0%} of them (late), and "
        "of the final model on the test split, in units of the scores: mean over the columns with that value, 95 % "
        "interval and p of a paired t-test over seeds, not corrected for their number."
    )
    if measured:
        note += f" Deviation: what averaging A and B apart lost in a round of {baseline}, relative to ‖ΔW‖_F."
    return TextTable(f"{results.name}-by-axis", f"{results.title}: differences by axis", head, lines, note)


def _groups(results: Results) -> list[tuple[str, list[Panel]]]:
    """The panels with each value of each axis that has several values, then all panels."""
    groups = []
    for axis, values in results.experiment.axes.items():
        if axis != results.experiment.rows and len(values) > 1:
            for value in values:
                panels = [panel for panel in results.panels if (axis, value) in panel.values]
                groups.append((f"{axis}: {results.label(value)}", panels))
    return [(label, panels) for label, panels in [*groups, ("all columns", results.panels)] if panels]


def _baseline_deviation(results: Results, deviations: pd.DataFrame, panels: Sequence[Panel]) -> list[float]:
    """Mean relative deviation of the baseline over these panels, for each seed."""
    return list(panel_means(deviations, results.baseline, panels)) if results.baseline in results.rows else []


def _text(difference: Difference | None, metric: Metric) -> str:
    if difference is None:
        return "–"
    factor, digits = metric.factor, metric.digits
    return f"{factor * difference.mean:+.{digits}f} ({interval(difference, factor, digits)}, p {p_value(difference)})"
