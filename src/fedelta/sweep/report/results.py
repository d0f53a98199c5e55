"""The rows of a grid, laid out as its experiments ask for: what is compared, in which column, under which seeds."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from fedelta.learning.tasks.metrics import Metric
from fedelta.runs.report.summary import REACH
from fedelta.sweep.cells import Expansion, Place
from fedelta.sweep.grid import Experiment, Grid
from fedelta.sweep.results import Row, evaluations, late_score, metric_of, score

LATE = 0.25
"""Share of the evaluations, from the end, that the late score is the mean of."""


@dataclass(frozen=True)
class Panel:
    """One value of every axis but the compared one.

    Args:
        label: those values that differ between panels.
    """

    values: tuple[tuple[str, str], ...]
    label: str


@dataclass(frozen=True)
class Results:
    """An experiment and what is known of its cells.

    Args:
        seeds: asked for.
        asked: number of cells.
        panels: with at least one result.
        cells: (row, panel) → seed → the cell's row; what has not run is not there.
        names: value of an axis → what people are shown for it, where that differs.
        goals: panel → the configured target.
    """

    name: str
    experiment: Experiment
    seeds: tuple[int, ...]
    asked: int
    panels: list[Panel]
    cells: Mapping[tuple[str, Panel], Mapping[int, Row]]
    names: Mapping[str, str]
    goals: Mapping[Panel, float | None]

    def label(self, row: str) -> str:
        """What people are shown for a row."""
        return self.names.get(row, row)

    @property
    def title(self) -> str:
        """With the values that all columns share, which no column names."""
        alone = [values[0] for axis, values in self.experiment.axes.items() if len(values) == 1]
        return ", ".join([self.experiment.title or self.name, *map(self.label, alone)])

    @property
    def rows(self) -> list[str]:
        """The values that are compared, as far as there is something."""
        return [row for row in self.experiment.axes[self.experiment.rows] if any(at[0] == row for at in self.cells)]

    @property
    def baseline(self) -> str:
        return self.experiment.baseline or self.experiment.axes[self.experiment.rows][0]

    @property
    def missing(self) -> int:
        """Cells that have not run."""
        return self.asked - sum(len(found) for found in self.cells.values())

    def trained(self, row: str, panel: Panel) -> dict[int, Row]:
        """Seed → row, of those that did not diverge."""
        return {seed: found for seed, found in self.cells.get((row, panel), {}).items() if found["failed"] is None}

    def values(self, row: str, panel: Panel, measure: "Measure") -> dict[int, float]:
        """Seed → measure, where there is one."""
        found = {seed: measure(cell) for seed, cell in self.trained(row, panel).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def pairs(self, row: str, panel: Panel, measure: "Measure") -> tuple[list[float], list[float]]:
        """The measure of a row and of the baseline under the same seeds."""
        ours, theirs = self.values(row, panel, measure), self.values(self.baseline, panel, measure)
        seeds = sorted(ours.keys() & theirs.keys())
        return [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]

    def target(self, panel: Panel) -> float | None:
        """Validation score for «rounds to target»: as configured, or a share of the best final one."""
        finals = [score(cell, "validation") for row in self.rows for cell in self.trained(row, panel).values()]
        if (goal := self.goals.get(panel)) is not None or not finals:
            return goal
        metric = self.metric(panel)
        return metric.share(metric.best(finals), REACH)

    def metric(self, panel: Panel) -> Metric:
        """What the cells of a panel are judged by."""
        return metric_of(next(cell for at, found in self.cells.items() if at[1] == panel for cell in found.values()))

    @property
    def metrics(self) -> list[Metric]:
        """Those of all panels, each once."""
        return list(dict.fromkeys(map(self.metric, self.panels)))


Measure = Callable[[Row], float | None]


def final_score(row: Row) -> float | None:
    return score(row)


def late_validation(row: Row) -> float | None:
    """Less noisy than one evaluation, and not chosen: the mean of the last quarter of them."""
    return late_score(row, LATE)


def first_validation(row: Row) -> float | None:
    """Before later rounds have made up for what an aggregation lost."""
    return next((found for _, found in evaluations(row)), None)


def rounds_to(target: float) -> Measure:
    """Finished rounds when the validation score first was at the target; None if it never was."""
    return lambda row: next((float(r) for r, found in evaluations(row) if metric_of(row).reaches(found, target)), None)


def gather(grid: Grid, rows: Mapping[str, Row]) -> list[Results]:
    """The experiments of a grid with what has been run of them."""
    _, plan = Expansion(grid).decided(rows)
    found = []
    for name, experiment in grid.experiments.items():
        cells: dict[tuple[str, Panel], dict[int, Row]] = {}
        goals: dict[Panel, float | None] = {}
        panels = _panels(grid, experiment)
        by_values = {panel.values: panel for panel in panels}
        for place in (place for place in plan.places if place.experiment == name):
            panel = by_values[tuple((axis, v) for axis, v in place.values.items() if axis != experiment.rows)]
            goals[panel] = plan.cells[place.key].evaluation.target
            if place.key in rows:
                cells.setdefault((place.values[experiment.rows], panel), {})[place.seed] = rows[place.key]
        asked = len(panels) * len(experiment.axes[experiment.rows]) * len(grid.seeds)
        ran = [panel for panel in panels if any(at[1] == panel for at in cells)]
        found.append(Results(name, experiment, grid.seeds, asked, ran, cells, grid.labels, goals))
    return found


def places(grid: Grid, rows: Mapping[str, Row]) -> list[Place]:
    """Trials and cells that have been run, in the order of the grid."""
    trials, cells = Expansion(grid).decided(rows)
    return [place for place in [*trials.places, *cells.places] if place.key in rows]


def _panels(grid: Grid, experiment: Experiment) -> list[Panel]:
    others = {axis: values for axis, values in experiment.axes.items() if axis != experiment.rows}
    panels = []
    for values in itertools.product(*others.values()):
        told = [value for axis, value in zip(others, values, strict=True) if len(others[axis]) > 1]
        panels.append(Panel(tuple(zip(others, values, strict=True)), grid.labels_of(told)))
    return panels


def mean_by_round(rows: Sequence[Row]) -> list[tuple[int, list[float]]]:
    """(finished rounds, validation score under each seed)."""
    by_round: dict[int, list[float]] = {}
    for row in rows:
        for number, found in evaluations(row):
            by_round.setdefault(number, []).append(found)
    return sorted(by_round.items())


def deviations(row: Row, kind: str) -> list[dict[str, float]]:
    """Module → deviation, a round; nothing where that kind was not measured.

    Args:
        kind: relative or scaled.
    """
    return [record["deviation"] for record in row["rounds"]] if kind == "relative" else row["scaled_deviation"] or []


def mean_by(cells: Sequence[Sequence[Mapping[str, float]]], key: Callable[[int, str], str | None]) -> dict[str, float]:
    """Key → deviation, mean over the rounds, modules and cells that have it.

    Args:
        key: of a round, counted from 1, and a module; None leaves it out.
    """
    found: dict[str, list[float]] = {}
    for cell in cells:
        for number, by_module in enumerate(cell, 1):
            for module, value in by_module.items():
                name = key(number, module)
                if name is not None:
                    found.setdefault(name, []).append(value)
    return {name: mean(values) for name, values in found.items()}


def mean_by_module(cells: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """Module → deviation, mean over rounds and cells."""
    return mean_by(cells, lambda _, module: module)


def mean_deviation(row: Row, kind: str) -> float | None:
    """Mean over modules and rounds of a run."""
    by_module = mean_by_module([deviations(row, kind)])
    return mean(by_module.values()) if by_module else None


def shares_of_energy(row: Row) -> list[list[float]]:
    """For each round the share of the adapter's energy in each rank index; zeros where it has none."""
    result = []
    for record in row["rounds"]:
        total = sum(record["energy"])
        result.append([value / total if total > 0 else 0.0 for value in record["energy"]])
    return result
