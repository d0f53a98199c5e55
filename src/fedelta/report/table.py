"""Runs of several methods and seeds as one table."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from rich.table import Table

from fedelta.atomic import write_file
from fedelta.runner import Run

MB = 1e6
REACH = 0.95
"""Share of the best final validation accuracy that is the target where none is configured."""


@dataclass(frozen=True)
class MethodSummary:
    """One method over its seeds.

    Args:
        method: its name.
        seeds: number of runs.
        accuracy, accuracy_std: of the final model on the test split, mean and standard deviation over seeds
            (None for one seed).
        rounds_to_target: mean over the seeds that reached it, None if none did.
        reached: how many seeds did.
        mb_down, mb_up: mean megabytes (10⁶ bytes) of all messages of a run.
        deviation: mean over rounds and layers of what averaging factors apart loses.
    """

    method: str
    seeds: int
    accuracy: float
    accuracy_std: float | None
    rounds_to_target: float | None
    reached: int
    mb_down: float
    mb_up: float
    deviation: float | None


def default_target(runs: Sequence[Run]) -> float:
    """The configured target, or 95 % of the best final validation accuracy among the runs."""
    return runs[0].config.evaluation.target or REACH * max(run.result["validation"]["accuracy"] for run in runs)


def rounds_to(target: float, run: Run) -> int | None:
    """Finished rounds when validation accuracy first was at the target; None if it never was."""
    for record in run.records:
        if record["validation"] and record["validation"]["accuracy"] >= target:
            return record["round"] + 1
    return None


def summarise(runs: Sequence[Run], target: float) -> list[MethodSummary]:
    """A row for each method, in the order in which they ran."""
    rows = []
    for method in dict.fromkeys(run.config.method.name for run in runs):
        mine = [run for run in runs if run.config.method.name == method]
        accuracies = [run.result["test"]["accuracy"] for run in mine]
        hits = [hit for run in mine if (hit := rounds_to(target, run)) is not None]
        traffic = [
            [sum(r[key]["total"] for r in run.records) / MB for run in mine] for key in ("bytes_down", "bytes_up")
        ]
        measured = [d for run in mine for r in run.records if (d := r["deviation_mean"]) is not None]
        rows.append(
            MethodSummary(
                method=method,
                seeds=len(mine),
                accuracy=mean(accuracies),
                accuracy_std=stdev(accuracies) if len(mine) > 1 else None,
                rounds_to_target=mean(hits) if hits else None,
                reached=len(hits),
                mb_down=mean(traffic[0]),
                mb_up=mean(traffic[1]),
                deviation=mean(measured) if measured else None,
            )
        )
    return rows


def columns(target: float) -> list[str]:
    return [
        "method",
        "test accuracy, %",
        f"rounds to {100 * target:.1f} %",
        "MB down",
        "MB up",
        "deviation",
    ]


def cells(row: MethodSummary) -> list[str]:
    """A row as text, in the order of `columns`."""
    spread = f" ± {100 * row.accuracy_std:.2f}" if row.accuracy_std is not None else ""
    rounds = "not reached" if row.rounds_to_target is None else f"{row.rounds_to_target:.1f}"
    if 0 < row.reached < row.seeds:
        rounds += f" ({row.reached} of {row.seeds})"
    return [
        row.method,
        f"{100 * row.accuracy:.2f}{spread}",
        rounds,
        f"{row.mb_down:.2f}",
        f"{row.mb_up:.2f}",
        "–" if row.deviation is None else f"{row.deviation:.3f}",
    ]


def caption(runs: Sequence[Run]) -> str:
    """What the figures are, in one line."""
    seeds = len({run.config.seed for run in runs})
    majority = mean(run.result["majority"] for run in runs)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return (
        f"Final model after {runs[0].config.rounds} rounds on the test split, {spread}; always answering the most "
        f"frequent class: {100 * majority:.2f} %. Rounds until validation accuracy reached the target. Megabytes of a "
        "whole run, as serialised. Deviation: what averaging A and B apart loses of the mean product."
    )


def write_table(runs: Sequence[Run], folder: Path) -> Path:
    """Write `table.json`: the target, and the fields of each `MethodSummary`."""
    target = default_target(runs)
    rows = [asdict(row) for row in summarise(runs, target)]
    write_file(folder / "table.json", json.dumps({"target": target, "rows": rows}, indent=2) + "\n")
    return folder / "table.json"


def console_table(runs: Sequence[Run]) -> Table:
    """The table for a terminal."""
    target = default_target(runs)
    table = Table(title=runs[0].config.data.source, caption=caption(runs), caption_justify="left")
    for i, name in enumerate(columns(target)):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in summarise(runs, target):
        table.add_row(*cells(row))
    return table
