"""Runs a grid's cells, each once: those in the Parquet file are done, one that was interrupted goes on."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from fedelta.errors import Diverged, FedeltaError, TooFewUpdates
from fedelta.federation.engines import Observer
from fedelta.federation.engines.workers import Result, Workers, can_fork
from fedelta.federation.run_folder import RunFolder
from fedelta.files import write_file
from fedelta.runs.assemble import splits_key, warm
from fedelta.runs.config import Config
from fedelta.runs.runner import run
from fedelta.sweep.cells import Choice, Expansion, Plan, Trial, Tuned, chosen_by, describe
from fedelta.sweep.grid import Grid
from fedelta.sweep.observer import SweepObserver
from fedelta.sweep.provenance import versions
from fedelta.sweep.results import Row, as_stored, first_difference, is_result_of, read_rows, row_of, write_rows

SPARE = 0.8
"""Share of the free memory that cells may take."""


class Sweep:
    """A grid on this machine.

    Args:
        grid: what is asked for.
        expansion: its cells, perhaps not all of them.
        folder: of the results.
        parallel: cells at once; `auto` takes as many as there are cores and memory for.
        keep: leave each cell's run folder, adapter and checkpoint included.
        retry: run cells again that diverged.
        observer: is told of progress.
    """

    def __init__(
        self,
        grid: Grid,
        expansion: Expansion,
        folder: Path,
        parallel: int | Literal["auto"] = "auto",
        keep: bool = False,
        retry: bool = False,
        observer: SweepObserver | None = None,
    ) -> None:
        self.grid = grid
        self.expansion = expansion
        self.parallel = parallel
        self.keep = keep
        self.retry = retry
        self.observer = observer or SweepObserver()
        self.folder = folder
        self.running = self.folder / "running"
        self.rows: dict[str, Row] = {}
        # Of the code that is loaded now, whatever is written beside it before the last cell ends.
        self.versions = versions()

    def run(self) -> dict[str, Row]:
        """Run what has not been run: the trials, then, with what they decide, the experiments.

        Returns:
            Cell → row, of all that the file holds.

        Raises:
            FedeltaError: for bad input, naming the cell. Whatever had finished is kept.
        """
        self.expansion.check()
        self._check_machine()
        with RunFolder(self.folder, {}).hold():
            self.rows = read_rows(self.folder)
            self._keep_grid()
            plan, trials = self.expansion.trials()
            if plan.cells:
                self._run_all("tuning", plan)
            self._run_all("experiments", self.expansion.cells(self._chosen(trials)))
            if self.running.is_dir() and not any(self.running.iterdir()):
                self.running.rmdir()
        return self.rows

    def check(self, key: str) -> str | None:
        """Run a cell of the file again, from the beginning, and compare; nothing of it is kept.

        Returns:
            The first difference, None where the new row is the old one.

        Raises:
            FedeltaError: for a cell that is not in the file, or not in the grid any more.
        """
        self.rows = read_rows(self.folder)
        trials, decided = self.expansion.decided(self.rows)
        cells = trials.cells | decided.cells
        if key not in self.rows or key not in cells:
            raise FedeltaError(f"no cell {key!r} in {self.folder}{' as the grid is now' if key in self.rows else ''}")
        with tempfile.TemporaryDirectory() as scratch:
            self.running = Path(scratch)
            self.observer.planned(key, {key: cells[key]}, [key], self.running)
            result = _run_cell(key, self._placed(key, cells[key], 1), self.versions)
        return first_difference(self.rows[key], as_stored(result.facts["row"]))

    def _keep_grid(self) -> None:
        """Leave the grid beside its results, from which reports are made."""
        file = self.folder / "grid.yaml"
        if file.exists() and self.rows:
            # No more than this: the grid itself may have come to have another form.
            before = (yaml.safe_load(file.read_text()) or {}).get("overrides", {})
            if before != self.grid.overrides:
                raise FedeltaError(
                    f"{self.folder} holds results with {_overrides(before)}, now {_overrides(self.grid.overrides)}; "
                    "choose another folder by --output"
                )
        write_file(file, yaml.safe_dump(self.grid.dump(), sort_keys=False))

    def _check_machine(self) -> None:
        wanted = 1 if self.parallel == "auto" else self.parallel
        if wanted > 1 and not can_fork():
            raise FedeltaError(f"--parallel {wanted} needs Linux and a machine without a GPU, expected 1")
        if wanted > 1 and self._threads() > 1:
            raise FedeltaError(f"--parallel {wanted}: cells with threads: {self._threads()} run one by one, expected 1")

    def _threads(self) -> int:
        return max(config.threads for config in self.expansion.cells(None).cells.values())

    def _chosen(self, trials: Sequence[Trial]) -> Mapping[Tuned, Choice] | None:
        chosen = chosen_by(self.grid, trials, self.rows)
        for values in dict.fromkeys(trial.values for trial in trials):
            name, choice = self.grid.labels_of(values), (chosen or {}).get(values)
            if choice is None:
                raise FedeltaError(f"tuning: every candidate of {name} diverged; add lower ones to tuning.search")
            named = ", ".join(f"{key} {setting}" for key, setting in choice.items())
            self.observer.say(f"chosen for {name}: {named}")
        return chosen

    def _run_all(self, what: str, plan: Plan) -> None:
        left = {key: config for key, config in plan.cells.items() if not self._is_done(key, config)}
        self.observer.planned(what, plan.cells, list(left), self.running)
        if not left:
            return
        names = {place.key: describe(place) for place in reversed(plan.places)}
        # All, before the first cell: bad input must not show after an hour.
        for key, config in {splits_key(config): (key, config) for key, config in reversed(left.items())}.values():
            try:
                warm(config)
            except FedeltaError as error:
                raise FedeltaError(f"{names[key]}: {error}") from error
        while self.parallel == "auto" and self._most() > 1 and (new := self._first_of_unknown_memory(left)):
            # How much memory a cell needs is seen from the first one.
            self._run_some({new: left.pop(new)}, names, 1)
        if left:
            self._run_some(left, names, self.parallel if self.parallel != "auto" else self._fitting(left))

    def _is_done(self, key: str, config: Config) -> bool:
        row = self.rows.get(key)
        return row is not None and is_result_of(row, config) and not (self.retry and row["failed"])

    def _run_some(self, cells: Mapping[str, Config], names: Mapping[str, str], parallel: int) -> None:
        keys = list(cells)
        configs = {key: self._placed(key, config, parallel) for key, config in cells.items()}

        def work(i: int) -> Result:
            try:
                return _run_cell(keys[i], configs[keys[i]], self.versions)
            except FedeltaError as error:
                raise FedeltaError(f"{names[keys[i]]}: {error}") from error

        for i, result in Workers(parallel, fresh=True).as_completed(work, [1.0] * len(keys)):
            key = keys[i]
            self.rows[key] = as_stored(result.facts["row"])
            write_rows(self.folder, self.rows)
            if not self.keep:
                shutil.rmtree(self.running / key, ignore_errors=True)
            for warning in result.facts["warnings"]:
                self.observer.say(f"{names[key]}: {warning}")
            self.observer.cell_done(key, names[key], self.rows[key])

    def _placed(self, key: str, config: Config, parallel: int) -> Config:
        """The same with its folder; where cells share the cores, each has one process."""
        workers = config.workers if parallel == 1 else 1
        return config.model_copy(update={"name": key, "output": str(self.running), "workers": workers})

    def _most(self) -> int:
        """Cells for which there are cores. A GPU serves one at a time, as do cores that a cell takes several of."""
        import joblib

        return joblib.cpu_count(only_physical_cores=True) if can_fork() and self._threads() == 1 else 1

    def _peaks(self) -> dict[str, float]:
        """Model → MB that its cells have been seen to take."""
        found: dict[str, float] = {}
        for row in self.rows.values():
            name = json.loads(row["config"])["model"]["name"]
            found[name] = max(found.get(name, 0.0), row["peak_mb"])
        return found

    def _first_of_unknown_memory(self, cells: Mapping[str, Config]) -> str | None:
        known = self._peaks()
        return next((key for key, config in cells.items() if config.model.name not in known), None)

    def _fitting(self, cells: Mapping[str, Config]) -> int:
        known = self._peaks()
        peak = max(known.get(config.model.name, 0.0) for config in cells.values())
        room = SPARE * psutil.virtual_memory().available / 2**20
        return max(1, min(self._most(), int(room / peak) if peak else self._most()))


def _overrides(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in overrides.items()) or "no overrides"


class _Warnings(Observer):
    def __init__(self) -> None:
        self.found: list[str] = []

    def warn(self, message: str) -> None:
        self.found.append(message)


def _run_cell(key: str, config: Config, made_with: Mapping[str, str]) -> Result:
    """In whichever process: a cell to its end, from where it was left."""
    told = _Warnings()
    try:
        row = row_of(key, config, made_with, run(config, resume=True, observer=told))
    except Diverged as error:
        row = row_of(key, config, made_with, None, str(error))
    except TooFewUpdates as error:
        # A result of these settings if training diverged; anything else has to be looked into, and ends the grid.
        if not error.diverged:
            raise
        row = row_of(key, config, made_with, None, str(error))
    return Result({"row": row, "warnings": told.found})
