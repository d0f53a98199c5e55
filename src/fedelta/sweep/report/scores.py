"""Tables of the scores of a grid's experiments, with tests against the baseline."""

from functools import partial

import pandas as pd

from fedelta.learning.tasks.metrics import METRICS, Metric
from fedelta.runs.report.statistics import interval, p_value, paired, spread
from fedelta.runs.report.summary import REACH
from fedelta.runs.report.text_table import TextTable
from fedelta.sweep.report.differences import difference, one_scale, panel_means
from fedelta.sweep.report.results import LATE, Measure, Panel, Results, final_score, late_validation, rounds_to
from fedelta.sweep.results import Row


def final(results: Results) -> TextTable:
    """Tabulate the test score of the final model."""
    note = f"Final model on the test split, {headings(results)}: mean ± standard deviation over seeds."
    return _compared(results, "score", final_score, f"test {titles(results)}", note)


def late(results: Results) -> TextTable:
    """Tabulate the validation score, mean of the last evaluations."""
    what = f"mean of the last {LATE:.0%} of evaluations"
    note = (
        f"Validation {headings(results)}, {what}: mean ± standard deviation over seeds. What was tuned was chosen on "
        "the same rows, under another seed."
    )
    return _compared(results, "late-score", late_validation, f"late validation {titles(results)}", note)


def all_scores(results: Results) -> TextTable:
    """Tabulate every test score of the final model that a task computes."""
    head = [results.experiment.rows]
    columns: dict[Panel, list[tuple[Metric, pd.DataFrame]]] = {}
    for panel in results.panels:
        # Each task has its own scores, such as a correlation or an accuracy.
        names = {name for row in results.rows for cell in results.trained_cells(row, panel) for name in cell["test"]}
        ordered = [*(name for name in METRICS if name in names), *sorted(names - METRICS.keys())]
        metrics = [_metric(name) for name in ordered]
        columns[panel] = [(metric, results.by_seed(partial(_test_score, metric.name))) for metric in metrics]
        prefix = f"{panel.label}, " if panel.label and len(results.panels) > 1 else ""
        head += [prefix + metric.heading for metric in metrics]

    def texts(row: str, panel: Panel) -> list[str]:
        return [
            spread(_seeds(values, row, panel), metric.factor, metric.digits) + _p(results, values, row, panel)
            for metric, values in columns[panel]
        ]

    note = (
        "Final model on the test split: mean ± standard deviation over seeds; in brackets p of a paired t-test against "
        f"{results.label(results.baseline)} over seeds, not corrected for their number."
    )
    name, title = f"{results.name}-all-scores", f"{results.title}: all scores"
    return TextTable(name, title, head, results.lines(texts), note)


def _metric(name: str) -> Metric:
    """The metric of a score; one counted by kind, such as `exact/boolq`, is a percentage if the whole is one."""
    whole = METRICS.get(name.partition("/")[0])
    return METRICS.get(name, Metric(name, name, percent=whole is not None and whole.percent))


def _test_score(name: str, row: Row) -> float | None:
    return row["test"].get(name)


def titles(results: Results) -> str:
    """The titles of the experiment's metrics, as text."""
    return " or ".join(metric.title for metric in results.metrics)


def headings(results: Results) -> str:
    """The titles and units of the experiment's metrics, as text."""
    return " or ".join(metric.heading for metric in results.metrics)


def _compared(results: Results, name: str, measure: Measure, title: str, note: str) -> TextTable:
    """Tabulate a measure with a column per panel, tests against the baseline, and columns for all panels together."""
    values = results.by_seed(measure)
    head = [results.experiment.rows]
    metrics = {panel: results.metric(panel) for panel in results.panels}
    different = len(results.metrics) > 1
    head += [f"{p.label}, {metrics[p].title}" if different else p.label or title for p in results.panels]
    combined = len(results.panels) > 1 and one_scale(results)
    if combined:
        head += ["all: mean", "difference", "95 % interval", "p"]

    def texts(row: str, panel: Panel) -> list[str]:
        seeds = _seeds(values, row, panel)
        text = spread(seeds, metrics[panel].factor, metrics[panel].digits)
        failed = results.count(row, panel) - len(results.trained_cells(row, panel))
        text = f"{text}, {failed} diverged" if failed else text
        return [text + _p(results, values, row, panel)]

    lines = results.lines(texts)
    if combined:
        for row, line in zip(results.rows, lines, strict=True):
            line += [_mean(results, values, row), *_difference(results, values, row)]
    if len(results.seeds) > 1:
        baseline = results.label(results.baseline)
        note += f" In brackets p of a paired t-test against {baseline} over seeds, not corrected for their number"
        note += "; all: of each seed's mean over the columns." if combined else "."
        note += " What diverged is in no mean and no test."
    return TextTable(f"{results.name}-{name}", f"{results.title}: {title}", head, lines, note)


def _seeds(values: pd.DataFrame, row: str, panel: Panel) -> list[float]:
    """The values of a row in a panel, of the seeds that have one."""
    return list(values.loc[(row, panel), :].dropna())


def _p(results: Results, values: pd.DataFrame, row: str, panel: Panel) -> str:
    """The p value of a row against the baseline in a panel, in brackets; empty where there is no test."""
    if row == results.baseline or results.baseline not in results.rows:
        return ""
    pairs = values.loc[[(row, panel), (results.baseline, panel)]].dropna(axis=1)
    tested = paired(*(list(seeds) for _, seeds in pairs.iterrows()))
    return "" if tested is None else f" ({p_value(tested)})"


def _mean(results: Results, values: pd.DataFrame, row: str) -> str:
    """Mean over all panels, computed seed by seed."""
    metric = results.metrics[0]
    return spread(list(panel_means(values, row, results.panels)), metric.factor, metric.digits)


def _difference(results: Results, values: pd.DataFrame, row: str) -> list[str]:
    """Difference to the baseline over all panels, its confidence interval and p; empty where there is no test."""
    tested = difference(results, values, row, results.panels)
    if tested is None:
        return ["", "", ""]
    factor, digits = results.metrics[0].factor, results.metrics[0].digits
    return [f"{factor * tested.mean:+.{digits}f}", interval(tested, factor, digits), p_value(tested)]


def rounds_to_target(results: Results) -> TextTable:
    """Tabulate the rounds until the validation score reached the target."""
    targets = {panel: target for panel in results.panels if (target := results.target(panel)) is not None}
    reached = {panel: results.by_seed(rounds_to(target)) for panel, target in targets.items()}
    head = [results.experiment.rows]
    head += [f"{panel.label} to {results.metric(panel).format(target, 1)}".strip() for panel, target in targets.items()]

    def texts(row: str, panel: Panel) -> list[str]:
        hits, ran = _seeds(reached[panel], row, panel), results.count(row, panel)
        missed = f", {len(hits)} of {ran}" if 0 < len(hits) < ran else ""
        return [spread(hits, digits=1) + missed if hits or not ran else "not reached"]

    note = (
        "Finished rounds when the validation score first was at the target, as far as it was evaluated, and how many "
        f"of the seeds reached it where not all did. The target is evaluation.target, or "
        f"{100 * REACH:.0f} % of the column's best final score."
    )
    name, title = f"{results.name}-rounds-to-target", f"{results.title}: rounds to target"
    return TextTable(name, title, head, results.lines(texts, list(targets)), note)
