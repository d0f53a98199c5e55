"""Where a difference is, and where it is not: each row against the baseline, by the values of the other axes."""

from collections.abc import Sequence
from functools import partial
from statistics import mean

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
    mean_deviation,
)
from fedelta.sweep.results import Row, evaluations


def by_seed(results: Results, row: str, measure: Measure, panels: Sequence[Panel]) -> dict[int, float]:
    """Seed → mean over these columns, where each of them has a value."""
    found = [results.values(row, panel, measure) for panel in panels]
    return {s: mean(values[s] for values in found) for s in found[0] if all(s in values for values in found)}


def difference(results: Results, row: str, measure: Measure, panels: Sequence[Panel]) -> Difference | None:
    """A row against the baseline, each seed's mean over these columns against the same seed's.

    Columns under one seed share shards, sampling and test texts: they are no independent pairs.
    """
    if row == results.baseline:
        return None
    ours, theirs = (by_seed(results, of, measure, panels) for of in (row, results.baseline))
    seeds = sorted(ours.keys() & theirs.keys())
    return paired([ours[s] for s in seeds], [theirs[s] for s in seeds])


def one_scale(results: Results) -> bool:
    """Whether scores of all columns can be averaged: as large, and better in one direction."""
    return len({(metric.factor, metric.lower) for metric in results.metrics}) == 1


def measures(results: Results) -> dict[str, Measure]:
    """What is compared, by its heading."""
    first = {evaluations(cell)[0][0] for at in results.cells.values() for cell in at.values() if evaluations(cell)}
    after = ", ".join(map(str, sorted(first)))
    return {f"after round {after}": first_validation, "late": late_validation, "test": final_score}


def over_rounds(results: Results, row: str) -> dict[int, Difference | None]:
    """Finished rounds → a row's validation score against the baseline's, over all columns; nothing where these can't be
    averaged."""
    if not one_scale(results):
        return {}
    numbers = sorted({r for at in results.cells.values() for cell in at.values() for r, _ in evaluations(cell)})
    return {r: difference(results, row, partial(_validation_after, r), results.panels) for r in numbers}


def _validation_after(number: int, row: Row) -> float | None:
    return dict(evaluations(row)).get(number)


def by_round(results: Results) -> TextTable:
    """The differences to the baseline round by round, over all columns."""
    others = [row for row in results.rows if row != results.baseline]
    baseline = results.label(results.baseline)
    found = [over_rounds(results, row) for row in others]
    numbers = found[0] if found else ()
    lines = [[str(r), *(_text(by_number[r], results.metrics[0]) for by_number in found)] for r in numbers]
    note = (
        f"Validation scores less those of {baseline}, in units of the scores: mean over all columns, 95 % interval and "
        "p of a paired t-test over seeds, not corrected for their number."
    )
    head = ["after round", *map(results.label, others)]
    name, title = f"{results.name}-difference-by-round", f"{results.title}: differences to {baseline} by round"
    return TextTable(name, title, head, lines, note)


def by_axis(results: Results) -> TextTable:
    """For each value of each other axis: the differences to the baseline over all columns with that value."""
    others = [row for row in results.rows if row != results.baseline]
    compared = measures(results)
    baseline = results.label(results.baseline)
    lost = bool(_deviation(results, results.panels))
    head = ["columns", *([f"{baseline}: deviation, %"] if lost else [])]
    head += [f"{results.label(row)}, {title}" for row in others for title in compared]
    lines = []
    for label, panels in _groups(results) if one_scale(results) else []:
        line = [label]
        if lost:
            line.append(spread(_deviation(results, panels), 100))
        for row in others:
            for measure in compared.values():
                line.append(_text(difference(results, row, measure, panels), results.metrics[0]))
        lines.append(line)
    note = (
        f"Differences to {baseline} in the first validation, in the mean of the last {LATE:.0%} of them (late), and "
        "of the final model on the test split, in units of the scores: mean over the columns with that value, 95 % "
        "interval and p of a paired t-test over seeds, not corrected for their number."
    )
    if lost:
        note += f" Deviation: what averaging A and B apart lost in a round of {baseline}, relative to ‖ΔW‖_F."
    return TextTable(f"{results.name}-by-axis", f"{results.title}: differences by axis", head, lines, note)


def _groups(results: Results) -> list[tuple[str, list[Panel]]]:
    """Columns with each value of each axis that has several, and all of them."""
    groups = []
    for axis, values in results.experiment.axes.items():
        if axis != results.experiment.rows and len(values) > 1:
            for value in values:
                panels = [panel for panel in results.panels if (axis, value) in panel.values]
                groups.append((f"{axis}: {results.label(value)}", panels))
    return [(label, panels) for label, panels in [*groups, ("all columns", results.panels)] if panels]


def _deviation(results: Results, panels: Sequence[Panel]) -> list[float]:
    """Of the baseline, each seed's mean."""
    measure = partial(mean_deviation, kind="relative")
    return list(by_seed(results, results.baseline, measure, panels).values())


def _text(found: Difference | None, metric: Metric) -> str:
    if found is None:
        return "–"
    factor, digits = metric.factor, metric.digits
    return f"{factor * found.mean:+.{digits}f} ({interval(found, factor, digits)}, p {p_value(found)})"
