"""A grid's results arranged by experiment: rows that are compared, panels beside each other, and seeds."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from fedelta.learning.tasks.metrics import Metric
from fedelta.runs.report.summary import REACH
from fedelta.sweep.cells import Expansion, Place
from fedelta.sweep.grid import Experiment, Grid
from fedelta.sweep.results import Row, evaluations, late_score, metric_of, score

LATE = 0.25
"""Share of the evaluations, from the end, over which the late score is averaged."""

Measure = Callable[[Row], float | None]
"""One number of a finished cell; None where the cell has none."""


@dataclass(frozen=True, order=True)
class Panel:
    """One combination of values of all axes except the compared one: a column of tables, a panel of figures.

    Args:
        values: (axis, value) pairs.
        label: the values that differ between panels.
    """

    values: tuple[tuple[str, str], ...]
    label: str


@dataclass(frozen=True)
class Results:
    """An experiment with the cells that have run.

    Args:
        name: name of the experiment.
        experiment: its settings.
        seeds: the seeds that the grid asks for.
        requested: number of cells that the grid asks for.
        panels: the panels with at least one result.
        cells: one line per cell that has run, with the columns `row` (value of the compared axis), `panel`, `seed` and
            `cell` (the stored row).
        names: value of an axis → the name shown instead of it.
        goals: panel → the configured target.
    """

    name: str
    experiment: Experiment
    seeds: tuple[int, ...]
    requested: int
    panels: list[Panel]
    cells: pd.DataFrame
    names: Mapping[str, str]
    goals: Mapping[Panel, float | None]

    def label(self, row: str) -> str:
        """The name shown for a row."""
        return self.names.get(row, row)

    @property
    def title(self) -> str:
        """The experiment's title, with the values that all panels share and no column names."""
        shared = [values[0] for axis, values in self.experiment.axes.items() if len(values) == 1]
        return ", ".join([self.experiment.title or self.name, *map(self.label, shared)])

    @cached_property
    def rows(self) -> list[str]:
        """The compared values that have at least one result, in the order of the grid."""
        present = set(self.cells["row"])
        return [row for row in self.experiment.axes[self.experiment.rows] if row in present]

    @property
    def baseline(self) -> str:
        """The row against which the other rows are tested."""
        return self.experiment.baseline or self.experiment.axes[self.experiment.rows][0]

    @property
    def missing(self) -> int:
        """Number of cells that have not run."""
        return self.requested - len(self.cells)

    @cached_property
    def trained(self) -> pd.DataFrame:
        """The lines of `cells` that did not diverge."""
        return self.cells[[cell["failed"] is None for cell in self.cells["cell"]]]

    def trained_cells(self, row: str, panel: Panel) -> list[Row]:
        """The cells of a row in a panel that did not diverge, in the order of the seeds."""
        return list(_at(self.trained, row, panel)["cell"])

    def count(self, row: str, panel: Panel) -> int:
        """Number of cells of a row in a panel that have run, including those that diverged."""
        return len(_at(self.cells, row, panel))

    def by_seed(self, measure: Measure) -> pd.DataFrame:
        """A measure of every trained cell.

        Returns:
            A table with the index (row, panel) and a column per seed; NaN where there is no value.
        """
        return self._by_seed(self.trained.assign(value=[measure(cell) for cell in self.trained["cell"]]))

    def mean_deviation(self, kind: str) -> pd.DataFrame:
        """Mean deviation over the modules and rounds of each run, laid out as in `by_seed`.

        Args:
            kind: relative or scaled.
        """
        by_module = self.deviations(kind).groupby(["row", "panel", "seed", "module"], as_index=False)["value"].mean()
        return self._by_seed(by_module.groupby(["row", "panel", "seed"], as_index=False)["value"].mean())

    def _by_seed(self, values: pd.DataFrame) -> pd.DataFrame:
        """Spread the column `value` over rows, panels and seeds."""
        index = pd.MultiIndex.from_product([self.rows, self.panels], names=["row", "panel"])
        series = values.set_index(["row", "panel", "seed"])["value"].astype(float)
        return series.unstack("seed").reindex(index=index, columns=list(self.seeds))

    def evaluations(self) -> pd.DataFrame:
        """Validation scores of the trained cells, with the columns row, panel, seed, round (finished rounds), value."""
        lines = [
            (row, panel, seed, number, value)
            for row, panel, seed, cell in self.trained.itertuples(index=False)
            for number, value in evaluations(cell)
        ]
        return pd.DataFrame(lines, columns=["row", "panel", "seed", "round", "value"])

    def deviations(self, kind: str) -> pd.DataFrame:
        """Deviations of the trained cells, with the columns row, panel, seed, round (from 1), module, value.

        Args:
            kind: relative or scaled.
        """
        lines = [
            (row, panel, seed, number, module, value)
            for row, panel, seed, cell in self.trained.itertuples(index=False)
            for number, by_module in enumerate(_deviations(cell, kind), 1)
            for module, value in by_module.items()
        ]
        return pd.DataFrame(lines, columns=["row", "panel", "seed", "round", "module", "value"])

    def lines(
        self, texts: Callable[[str, Panel], Sequence[str]], panels: Sequence[Panel] | None = None
    ) -> list[list[str]]:
        """The lines of a table: the label of each row, then the texts of each of its panels.

        Args:
            texts: (row, panel) → the texts of that row in that panel.
            panels: the panels that the table has columns for; None means all of them.
        """
        panels = self.panels if panels is None else panels
        return [[self.label(row), *(text for panel in panels for text in texts(row, panel))] for row in self.rows]

    def target(self, panel: Panel) -> float | None:
        """Validation score for "rounds to target": the configured one, or a share of the best final score."""
        finals = [score(cell, "validation") for row in self.rows for cell in self.trained_cells(row, panel)]
        if (goal := self.goals.get(panel)) is not None or not finals:
            return goal
        metric = self.metric(panel)
        return metric.share(metric.best(finals), REACH)

    def metric(self, panel: Panel) -> Metric:
        """The score that the cells of a panel are judged by."""
        return metric_of(self.cells[self.cells["panel"] == panel]["cell"].iloc[0])

    @cached_property
    def metrics(self) -> list[Metric]:
        """The metrics of all panels, each once."""
        return list(dict.fromkeys(map(self.metric, self.panels)))


def _at(cells: pd.DataFrame, row: str, panel: Panel) -> pd.DataFrame:
    return cells[(cells["row"] == row) & (cells["panel"] == panel)]


def final_score(row: Row) -> float | None:
    """Test score of the final model."""
    return score(row)


def late_validation(row: Row) -> float | None:
    """Mean of the last quarter of the validation scores: less noisy than one of them, and not selected."""
    return late_score(row, LATE)


def first_validation(row: Row) -> float | None:
    """The first validation score, before later rounds have made up for the loss of an aggregation."""
    return next((value for _, value in evaluations(row)), None)


def rounds_to(target: float) -> Measure:
    """Measure the finished rounds at which the validation score first reached the target; None if it never did."""
    return lambda row: next((float(r) for r, value in evaluations(row) if metric_of(row).reaches(value, target)), None)


def gather(grid: Grid, rows: Mapping[str, Row]) -> list[Results]:
    """Arrange stored rows by the experiments of a grid."""
    _, plan = Expansion(grid).decided(rows)
    gathered = []
    for name, experiment in grid.experiments.items():
        panels = _panels(grid, experiment)
        by_values = {panel.values: panel for panel in panels}
        lines = []
        goals: dict[Panel, float | None] = {}
        for place in (place for place in plan.places if place.experiment == name):
            panel = by_values[tuple((axis, v) for axis, v in place.values.items() if axis != experiment.rows)]
            goals[panel] = plan.cells[place.key].evaluation.target
            if place.key in rows:
                lines.append((place.values[experiment.rows], panel, place.seed, rows[place.key]))
        cells = pd.DataFrame(lines, columns=["row", "panel", "seed", "cell"])
        requested = len(panels) * len(experiment.axes[experiment.rows]) * len(grid.seeds)
        present = set(cells["panel"])
        shown = [panel for panel in panels if panel in present]
        gathered.append(Results(name, experiment, grid.seeds, requested, shown, cells, grid.labels, goals))
    return gathered


def places(grid: Grid, rows: Mapping[str, Row]) -> list[Place]:
    """The trials and cells that have run, in the order of the grid."""
    trials, cells = Expansion(grid).decided(rows)
    return [place for place in [*trials.places, *cells.places] if place.key in rows]


def _panels(grid: Grid, experiment: Experiment) -> list[Panel]:
    others = {axis: values for axis, values in experiment.axes.items() if axis != experiment.rows}
    panels = []
    for values in itertools.product(*others.values()):
        differing = [value for axis, value in zip(others, values, strict=True) if len(others[axis]) > 1]
        panels.append(Panel(tuple(zip(others, values, strict=True)), grid.labels_of(differing)))
    return panels


def _deviations(row: Row, kind: str) -> list[dict[str, float]]:
    """Module → deviation for each round; empty where this kind was not measured."""
    return [record["deviation"] for record in row["rounds"]] if kind == "relative" else row["scaled_deviation"]


def shares_of_energy(row: Row) -> list[list[float]]:
    """For each round, the share of the adapter's energy in each rank index; zeros for an adapter without energy."""
    result = []
    for record in row["rounds"]:
        total = sum(record["energy"])
        result.append([value / total if total > 0 else 0.0 for value in record["energy"]])
    return result
