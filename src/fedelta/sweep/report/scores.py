"""Tables of scores of a grid's experiments, with tests against the baseline."""

from functools import partial

from fedelta.learning.tasks.metrics import METRICS, Metric
from fedelta.runs.report.statistics import interval, p_value, paired, spread
from fedelta.runs.report.summary import REACH
from fedelta.runs.report.text_table import TextTable
from fedelta.sweep.report.differences import by_seed, difference, one_scale
from fedelta.sweep.report.results import LATE, Measure, Panel, Results, final_score, late_validation, rounds_to
from fedelta.sweep.results import Row


def final(results: Results) -> TextTable:
    """Test score of the final model."""
    note = f"Final model on the test split, {headings(results)}: mean ± standard deviation over seeds."
    return _compared(results, "score", final_score, f"test {titles(results)}", note)


def late(results: Results) -> TextTable:
    """Validation score, mean of the last evaluations."""
    what = f"mean of the last {LATE:.0%} of evaluations"
    note = (
        f"Validation {headings(results)}, {what}: mean ± standard deviation over seeds. What was tuned was chosen on "
        "the same rows, under another seed."
    )
    return _compared(results, "late-score", late_validation, f"late validation {titles(results)}", note)


def all_scores(results: Results) -> TextTable:
    """Every test score of the final model that a task computes."""
    head = [results.experiment.rows]
    columns = []
    for panel in results.panels:
        # Tasks have scores of their own: a correlation, an accuracy.
        found = {name for row in results.rows for cell in results.trained(row, panel).values() for name in cell["test"]}
        for name in [*(name for name in METRICS if name in found), *sorted(found - METRICS.keys())]:
            columns.append((panel, _metric(name)))
            several = panel.label and len(results.panels) > 1
            head.append(f"{panel.label}, {columns[-1][1].heading}" if several else columns[-1][1].heading)
    lines = []
    for row in results.rows:
        line = [results.label(row)]
        for panel, metric in columns:
            measure = partial(_test_score, metric.name)
            values = list(results.values(row, panel, measure).values())
            line.append(spread(values, metric.factor, metric.digits) + _p(results, row, panel, measure))
        lines.append(line)
    note = (
        "Final model on the test split: mean ± standard deviation over seeds; in brackets p of a paired t-test against "
        f"{results.label(results.baseline)} over seeds, not corrected for their number."
    )
    return TextTable(f"{results.name}-all-scores", f"{results.title}: all scores", head, lines, note)


def _metric(name: str) -> Metric:
    """One that is counted by kind, as `exact/boolq`, is shown as the whole; any other is shown as it is."""
    whole = METRICS.get(name.partition("/")[0])
    return METRICS.get(name, Metric(name, name, percent=whole is not None and whole.percent))


def _test_score(name: str, row: Row) -> float | None:
    return row["test"].get(name)


def titles(results: Results) -> str:
    return " or ".join(metric.title for metric in results.metrics)


def headings(results: Results) -> str:
    return " or ".join(metric.heading for metric in results.metrics)


def _compared(results: Results, name: str, measure: Measure, title: str, note: str) -> TextTable:
    """A column a panel, with the test against the baseline; last the differences of all panels together."""
    head = [results.experiment.rows]
    metrics = {panel: results.metric(panel) for panel in results.panels}
    different = len(results.metrics) > 1
    head += [f"{p.label}, {metrics[p].title}" if different else p.label or title for p in results.panels]
    several = len(results.panels) > 1 and one_scale(results)
    if several:
        head += ["all: mean", "difference", "95 % interval", "p"]
    lines = []
    for row in results.rows:
        line = [results.label(row)]
        for panel in results.panels:
            line.append(_with_failures(results, row, panel, measure) + _p(results, row, panel, measure))
        if several:
            line += [_mean(results, row, measure), *_difference(results, row, measure)]
        lines.append(line)
    if len(results.seeds) > 1:
        baseline = results.label(results.baseline)
        note += f" In brackets p of a paired t-test against {baseline} over seeds, not corrected for their number"
        note += "; all: of each seed's mean over the columns." if several else "."
        note += " What diverged is in no mean and no test."
    return TextTable(f"{results.name}-{name}", f"{results.title}: {title}", head, lines, note)


def _with_failures(results: Results, row: str, panel: Panel, measure: Measure) -> str:
    metric = results.metric(panel)
    values = list(results.values(row, panel, measure).values())
    text = spread(values, metric.factor, metric.digits)
    failed = len(results.cells.get((row, panel), {})) - len(results.trained(row, panel))
    return f"{text}, {failed} diverged" if failed else text


def _p(results: Results, row: str, panel: Panel, measure: Measure) -> str:
    found = None if row == results.baseline else paired(*results.pairs(row, panel, measure))
    return "" if found is None else f" ({p_value(found)})"


def _mean(results: Results, row: str, measure: Measure) -> str:
    """Over all columns, each seed's mean by itself."""
    return spread(
        list(by_seed(results, row, measure, results.panels).values()),
        results.metrics[0].factor,
        results.metrics[0].digits,
    )


def _difference(results: Results, row: str, measure: Measure) -> list[str]:
    found = difference(results, row, measure, results.panels)
    if found is None:
        return ["", "", ""]
    factor, digits = results.metrics[0].factor, results.metrics[0].digits
    return [f"{factor * found.mean:+.{digits}f}", interval(found, factor, digits), p_value(found)]


def rounds_to_target(results: Results) -> TextTable:
    """Rounds until the validation score reached the target."""
    targets = {panel: target for panel in results.panels if (target := results.target(panel)) is not None}
    head = [results.experiment.rows]
    head += [f"{panel.label} to {results.metric(panel).show(target, 1)}".strip() for panel, target in targets.items()]
    lines = []
    for row in results.rows:
        line = [results.label(row)]
        for panel, target in targets.items():
            ran = results.cells.get((row, panel), {})
            hits = list(results.values(row, panel, rounds_to(target)).values())
            missed = f", {len(hits)} of {len(ran)}" if 0 < len(hits) < len(ran) else ""
            line.append(spread(hits, digits=1) + missed if hits or not ran else "not reached")
        lines.append(line)
    note = (
        "Finished rounds when the validation score first was at the target, as far as it was evaluated, and how many "
        f"of the seeds reached it where not all did. The target is evaluation.target, or "
        f"{100 * REACH:.0f} % of the column's best final score."
    )
    return TextTable(f"{results.name}-rounds-to-target", f"{results.title}: rounds to target", head, lines, note)
