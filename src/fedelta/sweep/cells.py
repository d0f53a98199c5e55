"""The cells of a grid: the configuration of each run, and its place in the experiments."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from fedelta.errors import FedeltaError
from fedelta.runs.assemble import make_server
from fedelta.runs.config import Config, parse_config
from fedelta.sweep.cell_settings import cell_settings, crossed
from fedelta.sweep.grid import Grid
from fedelta.sweep.results import Row, late_loss, late_score, metric_of, result_settings

Choice = dict[str, Any]
"""Key → value that tuning has chosen."""

Tuned = tuple[str, ...]
"""One value of each tuned axis."""


@dataclass(frozen=True)
class Place:
    """The place of a cell in an experiment.

    Args:
        experiment: name of the experiment, or `tuning`.
        values: axis → value.
        seed: seed of the cell.
        key: key of the cell.
    """

    experiment: str
    values: Mapping[str, str]
    seed: int
    key: str


@dataclass
class Plan:
    """Cells by key, each once, in the order in which they run, and their places in the experiments."""

    cells: dict[str, Config] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)

    def add(self, experiment: str, values: Mapping[str, str], seed: int, config: Config) -> None:
        key = cell_key(config)
        self.cells.setdefault(key, config)
        self.places.append(Place(experiment, values, seed, key))


@dataclass(frozen=True)
class Trial:
    """One candidate of the tuning for one combination of values, with the keys of its cells."""

    values: Tuned
    choice: Choice
    keys: tuple[str, ...]


def cell_key(config: Config) -> str:
    """The key of a cell: 16 hexadecimal digits of a hash of all settings that its result depends on.

    Settings at their defaults are left out, so that results stay valid when a new setting is added.
    """
    settings = _without(result_settings(config), result_settings(Config()))
    settings |= {"method": config.dump()["method"], "seed": config.seed}
    return hashlib.sha256(json.dumps(_plain(settings), sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Write whole numbers as integers, because 1.0 and 1 are the same setting."""
    if isinstance(value, Mapping):
        return {key: _plain(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_plain(below) for below in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _without(data: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from the defaults, level by level."""
    differing = {}
    for key, value in data.items():
        if key in defaults and value == defaults[key]:
            continue
        nested = isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping)
        differing[key] = _without(value, defaults[key]) if nested else value
    return differing


class Expansion:
    """The cells of a grid, or of a part of it.

    Args:
        grid: the grid.
        only: names of experiments; empty means all.
        where: axis → values; cells with other values are left out.

    Raises:
        FedeltaError: for a name that the grid lacks.
    """

    def __init__(self, grid: Grid, only: Sequence[str] = (), where: Mapping[str, Sequence[str]] | None = None) -> None:
        self.grid = grid
        self.where = where or {}
        for name in only:
            if name not in grid.experiments:
                raise FedeltaError(f"no experiment {name!r} in the grid, found {', '.join(grid.experiments)}")
        self.experiments = {name: e for name, e in grid.experiments.items() if not only or name in only}
        for axis, values in self.where.items():
            for value in values:
                if value not in grid.axes.get(axis, {}):
                    raise FedeltaError(f"axis {axis!r} has no value {value!r} in the grid")

    def whole(self) -> "Expansion":
        """Return the expansion of the whole grid, or this one if another part of the grid is not valid."""
        whole = Expansion(self.grid)
        try:
            whole.cells(None)
        except FedeltaError:
            return self
        return whole

    def trials(self) -> tuple[Plan, list[Trial]]:
        """Plan the trials of the tuning, for the values that the experiments need."""
        plan = Plan()
        trials: list[Trial] = []
        tuning = self.grid.tuning
        if tuning is None:
            return plan, trials
        tuned = [name for name, experiment in self.experiments.items() if experiment.tuned]
        wanted = {tuple(at[a] for a in tuning.axes) for name in tuned for at in self._crossed(name)}
        for values in itertools.product(*(self.grid.axes[axis] for axis in tuning.axes)):
            if values not in wanted:
                continue
            at = dict(zip(tuning.axes, values, strict=True))
            for candidate in itertools.product(*tuning.search.values()):
                choice = dict(zip(tuning.search, candidate, strict=True))
                begin = len(plan.places)
                for seed in tuning.seeds:
                    config = self._config(tuning.at | at, tuning.config, choice, seed)
                    plan.add("tuning", at, seed, config)
                trials.append(Trial(values, choice, tuple(place.key for place in plan.places[begin:])))
        return plan, trials

    def cells(self, chosen: Mapping[Tuned, Choice] | None) -> Plan:
        """Plan the cells of the experiments.

        Args:
            chosen: values of the tuned axes → their choice. Cells without a choice are left out. None plans all cells
                without tuning.
        """
        plan = Plan()
        for name, experiment in self.experiments.items():
            tuned = self.grid.tuning.axes if self.grid.tuning and chosen is not None and experiment.tuned else None
            for seed in self.grid.seeds:
                for values in self._crossed(name):
                    choice = (chosen or {}).get(tuple(values[axis] for axis in tuned)) if tuned else {}
                    if choice is not None:
                        plan.add(name, values, seed, self._config(values, experiment.config, choice, seed))
        return plan

    def decided(self, rows: Mapping[str, Row]) -> tuple[Plan, Plan]:
        """Plan the trials, and the cells for which the trials that have run decide the choice."""
        plan, trials = self.trials()
        return plan, self.cells(chosen_by(self.grid, trials, rows))

    def check(self) -> None:
        """Check, before the first cell runs, that there are cells and that their configurations are valid and distinct.

        Raises:
            FedeltaError: naming the cell.
        """
        cells = self.cells(None)
        if not cells.places:
            raise FedeltaError(f"grid {self.grid.name}: these experiments have no cell with these values")
        for plan in (self.trials()[0], cells):
            for place in plan.places:
                config = plan.cells[place.key]
                try:
                    make_server(config)
                except FedeltaError as error:
                    raise FedeltaError(f"{describe(place)}: {error}") from error
                if config.training.stack == "auto":
                    raise FedeltaError(
                        f"{describe(place)}: training.stack: auto, expected a number, because auto changes bits"
                    )
        seen: dict[tuple[str, int, str], Place] = {}
        for place in cells.places:
            other = seen.setdefault((place.experiment, place.seed, place.key), place)
            if other is not place:
                raise FedeltaError(f"{describe(other)} and {describe(place)} are the same configuration")
            views = self.grid.experiments[place.experiment].show
            if "first-aggregation" in views and not cells.cells[place.key].evaluation.clients:
                raise FedeltaError(f"{describe(place)}: first-aggregation needs evaluation.clients: 1 or more")

    def _crossed(self, name: str) -> Iterator[dict[str, str]]:
        for point in crossed(self.grid.experiments[name].axes):
            if all(point.get(axis) in allowed for axis, allowed in self.where.items() if axis in point):
                yield point

    def _config(self, values: Mapping[str, str], own: Mapping[str, Any], choice: Choice, seed: int) -> Config:
        data, name = cell_settings(self.grid, values, own, choice)
        return parse_config(data | {"seed": seed}, name)


def choose(trials: Sequence[Trial], rows: Mapping[str, Row], last: float) -> dict[Tuned, Choice]:
    """Choose the best candidate for each combination of values by its validation score.

    The score is the mean over seeds and late evaluations. Of candidates with equal scores, the one with the lower loss
    wins: as long as no candidate separates the classes, the loss tells which one is closest to that.

    Args:
        trials: the candidates.
        rows: key → row of the trials that have run.
        last: share of the evaluations, from the end, that count.

    Returns:
        Values → choice, without the values for which a trial is missing or every candidate diverged.
    """
    missing = {trial.values for trial in trials if any(key not in rows for key in trial.keys)}
    best: dict[Tuned, tuple[tuple[float, float], Choice]] = {}
    for trial in trials:
        if trial.values in missing:
            continue
        scores = [late_score(rows[key], last) for key in trial.keys]
        if None in scores:
            continue  # a candidate that diverged under any seed is never chosen
        score = mean(s for s in scores if s is not None)
        loss = mean(late_loss(rows[key], last) for key in trial.keys)
        order = (score if metric_of(rows[trial.keys[0]]).lower else -score, loss)
        if trial.values not in best or order < best[trial.values][0]:
            best[trial.values] = order, trial.choice
    return {values: choice for values, (_, choice) in best.items()}


def chosen_by(grid: Grid, trials: Sequence[Trial], rows: Mapping[str, Row]) -> Mapping[Tuned, Choice] | None:
    """The choice that the trials in these rows decide; None for a grid without tuning."""
    return choose(trials, rows, grid.tuning.last) if grid.tuning else None


def describe(place: Place) -> str:
    """Describe a cell in words."""
    return f"{place.experiment}: {', '.join(place.values.values())}, seed {place.seed}"
