"""The table of a comparison: runs of several methods and seeds."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from rich.table import Table

from fedelta.errors import quantity
from fedelta.files import write_file
from fedelta.learning.tasks import LanguageTask
from fedelta.learning.tasks.metrics import METRICS, Metric
from fedelta.runs.identity import differing_inputs
from fedelta.runs.runner import Run

MB = 1e6
REACH = 0.95
"""Share of the best final validation score that is the target if none is configured."""


@dataclass(frozen=True)
class MethodSummary:
    """Summary of one method over its seeds.

    Args:
        method: name of the method.
        seeds: number of runs.
        score, score_std: test score of the final model, mean and standard deviation over seeds (None for one seed).
        rounds_to_target: rounds until the target, mean over the seeds that reached it; None if no seed did.
        reached: number of seeds that reached the target.
        mb_down, mb_up: mean megabytes (10⁶ bytes) of all messages of a run, to and from the clients.
        lost: what the method's steps lost of the mean product, mean over rounds and modules; None if not measured.
        more: further score that was asked for → its mean and standard deviation, as `score`.
    """

    method: str
    seeds: int
    score: float
    score_std: float | None
    rounds_to_target: float | None
    reached: int
    mb_down: float
    mb_up: float
    lost: float | None
    more: dict[str, tuple[float, float | None]]


def default_target(runs: Sequence[Run]) -> float:
    """The configured target, or a target 5 % short of the best final validation score among the runs."""
    metric = metric_of(runs)
    finals = [run.result["validation"][metric.name] for run in runs]
    goal = runs[0].config.evaluation.target
    return metric.share(metric.best(finals), REACH) if goal is None else goal


def metric_of(runs: Sequence[Run]) -> Metric:
    """The metric that these runs are judged by."""
    return runs[0].config.task.judged


def more_metrics(runs: Sequence[Run]) -> list[Metric]:
    """The further scores of generated text that these runs were asked for."""
    task = runs[0].config.task
    if not isinstance(task, LanguageTask):
        return []
    exact = (*(["exact"] if task.answer else []), *(["exact_macro"] if task.by else []))
    names = [name for name in (*task.scores, *exact) if name != task.metric]
    return [METRICS[name] for name in names if all(name in run.test for run in runs)]


def _mean_and_spread(scores: Sequence[float]) -> tuple[float, float | None]:
    return mean(scores), stdev(scores) if len(scores) > 1 else None


def rounds_to(target: float, run: Run) -> int | None:
    """Finished rounds at which the validation score first reached the target; None if it never did."""
    metric = run.config.task.judged
    for record in run.records:
        if record["validation"] and metric.reaches(record["validation"][metric.name], target):
            return record["round"] + 1
    return None


def summarize(runs: Sequence[Run], target: float) -> list[MethodSummary]:
    """Summarize each method, in the order in which the methods ran."""
    rows = []
    for method in dict.fromkeys(run.config.method.name for run in runs):
        own = [run for run in runs if run.config.method.name == method]
        score, score_std = _mean_and_spread([run.test[metric_of(runs).name] for run in own])
        hits = [hit for run in own if (hit := rounds_to(target, run)) is not None]
        traffic = [
            [sum(r[key]["total"] for r in run.records) / MB for run in own] for key in ("bytes_down", "bytes_up")
        ]
        measured = [d for run in own for r in run.records if (d := r.get("lost_mean")) is not None]
        rows.append(
            MethodSummary(
                method=method,
                seeds=len(own),
                score=score,
                score_std=score_std,
                rounds_to_target=mean(hits) if hits else None,
                reached=len(hits),
                mb_down=mean(traffic[0]),
                mb_up=mean(traffic[1]),
                lost=mean(measured) if measured else None,
                more={
                    metric.name: _mean_and_spread([run.test[metric.name] for run in own])
                    for metric in more_metrics(runs)
                },
            )
        )
    return rows


def columns(metric: Metric, target: float, more: Sequence[Metric] = ()) -> list[str]:
    """Headings of the columns, with those of `more` after the score by which runs are compared."""
    return [
        "method",
        *(f"test {each.heading}" for each in (metric, *more)),
        f"rounds to {metric.format(target, 1)}",
        "MB down",
        "MB up",
        "lost, %",
    ]


def cells(metric: Metric, row: MethodSummary) -> list[str]:
    """Format a row, in the order of `columns`."""
    rounds = "not reached" if row.rounds_to_target is None else f"{row.rounds_to_target:.1f}"
    if 0 < row.reached < row.seeds:
        rounds += f" ({row.reached} of {row.seeds})"
    return [
        row.method,
        _score_cell(metric, row.score, row.score_std),
        *(_score_cell(METRICS[name], *values) for name, values in row.more.items()),
        rounds,
        f"{row.mb_down:.2f}",
        f"{row.mb_up:.2f}",
        "–" if row.lost is None else f"{100 * row.lost:.1f}",
    ]


def _score_cell(metric: Metric, score: float, spread: float | None) -> str:
    shown = f"{metric.factor * score:.{metric.digits}f}"
    return shown if spread is None else f"{shown} ± {metric.factor * spread:.{metric.digits}f}"


def caption(runs: Sequence[Run]) -> str:
    """Explain the numbers of the table in one line."""
    seeds = len({run.config.seed for run in runs})
    constant = [score for run in runs if (score := run.result["constant_score"]) is not None]
    frequent = f"; always answering the most frequent class: {100 * mean(constant):.2f} %" if constant else ""
    before = [run.result["test_before"] for run in runs if "test_before" in run.result]
    known = [scores[metric_of(runs).name] for scores in before if metric_of(runs).name in scores]
    frequent += f"; before training: {metric_of(runs).format(mean(known))}" if known else ""
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    differing = differing_inputs([run.result.get("inputs", {}) for run in runs])
    warning = f" These runs differ in their {', '.join(differing)}." if differing else ""
    return (
        f"Final model after {quantity(runs[0].config.rounds, 'round')} on the test split, {spread}{frequent}. "
        f"Rounds until the validation {metric_of(runs).title} reached the target. Megabytes of a whole run, as "
        f"serialized. Lost: what the method's averages lost of the mean of what the clients learned.{warning}"
    )


def write_table(runs: Sequence[Run], folder: Path) -> Path:
    """Write `table.json` with the metric, the target, and the fields of each `MethodSummary`."""
    target = default_target(runs)
    rows = [asdict(row) for row in summarize(runs, target)]
    write_file(
        folder / "table.json",
        json.dumps({"metric": metric_of(runs).name, "target": target, "rows": rows}, indent=2) + "\n",
    )
    return folder / "table.json"


def console_table(runs: Sequence[Run]) -> Table:
    """Build the table for a terminal."""
    target = default_target(runs)
    table = Table(title=runs[0].config.data.title, caption=caption(runs), caption_justify="left")
    metric = metric_of(runs)
    for i, name in enumerate(columns(metric, target, more_metrics(runs))):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in summarize(runs, target):
        table.add_row(*cells(metric, row))
    return table
