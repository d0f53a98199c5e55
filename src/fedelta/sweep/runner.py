"""Run the cells of a grid, each once: cells in the Parquet file are done, an interrupted cell resumes."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import yaml

from fedelta.errors import FedeltaError
from fedelta.federation.engines.workers import Result, Workers, can_fork
from fedelta.federation.run_folder import RunFolder
from fedelta.files import write_file
from fedelta.reading import read_yaml
from fedelta.runs.assemble import splits_key, warm
from fedelta.runs.config import Config
from fedelta.runs.identity import check_changes, identify, input_changes
from fedelta.sweep.cell_run import run_cell
from fedelta.sweep.cells import Choice, Expansion, Plan, Trial, Tuned, chosen_by, describe
from fedelta.sweep.grid import Grid
from fedelta.sweep.observer import SweepObserver
from fedelta.sweep.provenance import versions
from fedelta.sweep.results import (
    Row,
    as_stored,
    first_difference,
    is_result_of,
    read_rows,
    stored_inputs,
    write_rows,
)

MAX_MEMORY_SHARE = 0.8
"""Share of the free memory that running cells may use."""


class Sweep:
    """Runs a grid on this machine.

    Args:
        grid: the grid.
        expansion: its cells, or a part of them.
        folder: folder for the results.
        parallel: number of cells that run at once; `auto` means as many as cores and memory allow.
        keep: keep the run folder of each cell, including adapter and checkpoint.
        retry: run cells that diverged again.
        observer: receives the progress.
        accept_changed_data: keep finished cells, and resume interrupted ones, even if rows, tokenizer or base model are
            no longer those that they have learned from.
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
        accept_changed_data: bool = False,
    ) -> None:
        self.grid = grid
        self.expansion = expansion
        self.parallel = parallel
        self.keep = keep
        self.retry = retry
        self.accept_changed_data = accept_changed_data
        self.observer = observer or SweepObserver()
        self.folder = folder
        self.running = self.folder / "running"
        self.rows: dict[str, Row] = {}
        # Versions of the code that is loaded now, even if its files change before the last cell ends.
        self.versions = versions()

    def run(self) -> dict[str, Row]:
        """Run the cells that have not run: first the trials, then the experiments with the choice of the trials.

        Returns:
            Key → row of every cell in the file.

        Raises:
            FedeltaError: for bad input, naming the cell. Finished cells are kept.
        """
        self.expansion.check()
        self._check_machine()
        with RunFolder(self.folder, {}).hold():
            self.rows = read_rows(self.folder)
            before = dict(self.rows)
            self._keep_grid()
            plan, trials = self.expansion.trials()
            if plan.cells:
                self._run_all("tuning", plan)
            self._run_all("experiments", self.expansion.cells(self._chosen(trials)))
            if self.rows != before:
                write_rows(self.folder, self.rows, self._axes())
            if self.running.is_dir() and not any(self.running.iterdir()):
                self.running.rmdir()
        return self.rows

    def _axes(self) -> dict[str, dict[str, str]]:
        """Key → axis → value of each cell. A cell with several places has all its values, separated by commas."""
        found: dict[str, dict[str, list[str]]] = {}
        for plan in self.expansion.whole().decided(self.rows):
            for place in plan.places:
                for axis, value in place.values.items():
                    values = found.setdefault(place.key, {}).setdefault(axis, [])
                    values += [] if value in values else [value]
        return {key: {axis: ", ".join(values) for axis, values in axes.items()} for key, axes in found.items()}

    def check(self, key: str) -> str | None:
        """Run a cell of the file again from the beginning and compare the rows; the new row is not stored.

        Returns:
            The first difference; None if the rows are equal.

        Raises:
            FedeltaError: for a cell that is not in the file, or no longer in the grid.
        """
        self.rows = read_rows(self.folder)
        trials, decided = self.expansion.decided(self.rows)
        cells = trials.cells | decided.cells
        if key not in self.rows or key not in cells:
            place = f"the grid of {self.folder}" if key in self.rows else self.folder
            raise FedeltaError(f"no cell {key!r} in {place}")
        with tempfile.TemporaryDirectory() as scratch:
            self.running = Path(scratch)
            self.observer.planned(key, {key: cells[key]}, [key], self.running)
            result = run_cell(key, self._placed(key, cells[key], 1), self.versions)
        return first_difference(self.rows[key], as_stored(result.facts["row"]))

    def _keep_grid(self) -> None:
        """Write the grid next to its results; reports need both."""
        file = self.folder / "grid.yaml"
        if file.exists() and self.rows:
            # Only the overrides are compared; the grid itself may have changed since.
            stored = read_yaml(file)
            before = stored.get("overrides", {}) if isinstance(stored, Mapping) else {}
            if before != self.grid.overrides:
                raise FedeltaError(
                    f"{self.folder} holds results with {_overrides(before)}, now {_overrides(self.grid.overrides)}; "
                    "choose another folder with --output"
                )
        write_file(file, yaml.safe_dump(self.grid.dump(), sort_keys=False))

    def _check_machine(self) -> None:
        wanted = 1 if self.parallel == "auto" else self.parallel
        if wanted > 1 and (not can_fork() or self._on_gpu()):
            raise FedeltaError(f"--parallel {wanted} needs Linux, and cells that run on the CPU; expected 1")
        if wanted > 1 and self._threads() > 1:
            raise FedeltaError(
                f"--parallel {wanted}: cells with threads: {self._threads()} run one at a time, expected 1"
            )

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
        names = {place.key: describe(place) for place in reversed(plan.places)}
        self._check_inputs({key: config for key, config in plan.cells.items() if key not in left}, names)
        self.observer.planned(what, plan.cells, list(left), self.running)
        if not left:
            return
        # Load all data before the first cell runs, so that bad input does not surface after an hour.
        for key, config in {splits_key(config): (key, config) for key, config in reversed(left.items())}.values():
            try:
                warm(config)
                # Forked cells inherit these digests.
                identify(config)
            except FedeltaError as error:
                raise FedeltaError(f"{names[key]}: {error}") from error
        while self.parallel == "auto" and self._max_parallel() > 1 and (new := self._first_of_unknown_memory(left)):
            # The first cell of a model shows how much memory its cells need.
            self._run_some({new: left.pop(new)}, names, 1)
        if left:
            self._run_some(left, names, self.parallel if self.parallel != "auto" else self._fitting(left))

    def _check_inputs(self, done: Mapping[str, Config], names: Mapping[str, str]) -> None:
        """Compare what finished cells have learned from with what is there now.

        Raises:
            FedeltaError: naming a cell and what has changed, unless that is accepted; the row of the cell then says so.
        """
        for key, config in done.items():
            row = self.rows[key]
            if not (before := stored_inputs(row)):
                continue
            try:
                changes = input_changes(before, identify(config))
            except FedeltaError:
                # The result remains what it is, even if its data are no longer on this machine.
                continue
            check_changes(f"{names[key]} has run with other inputs", changes, self.accept_changed_data)
            if changes and row["accepted"] != changes:
                self.rows[key] = as_stored(row | {"accepted": changes})
                write_rows(self.folder, self.rows)
                self.observer.say(f"{names[key]} is kept, although {'; '.join(changes)}")

    def _is_done(self, key: str, config: Config) -> bool:
        row = self.rows.get(key)
        return row is not None and is_result_of(row, config) and not (self.retry and row["failed"])

    def _run_some(self, cells: Mapping[str, Config], names: Mapping[str, str], parallel: int) -> None:
        keys = list(cells)
        configs = {key: self._placed(key, config, parallel) for key, config in cells.items()}

        def work(i: int) -> Result:
            try:
                return run_cell(keys[i], configs[keys[i]], self.versions, self.accept_changed_data)
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
        """Set the run folder of a cell; cells that run side by side have one process each."""
        workers = config.workers if parallel == 1 else 1
        return config.model_copy(update={"name": key, "output": str(self.running), "workers": workers})

    def _max_parallel(self) -> int:
        """Number of cells that cores allow: one on a GPU, and one if a cell uses several threads."""
        import joblib

        alone = not can_fork() or self._on_gpu() or self._threads() > 1
        return 1 if alone else joblib.cpu_count(only_physical_cores=True)

    def _on_gpu(self) -> bool:
        """Whether a cell would run on a GPU: its memory is not what cells are fitted into, and a fork cannot use it."""
        # Cells are expanded only where there is a GPU: in a large grid that takes a while.
        return torch.cuda.is_available() and any(
            config.model.device != "cpu" for config in self.expansion.cells(None).cells.values()
        )

    def _peaks(self) -> dict[str, float]:
        """Model → largest peak memory of its cells in MB."""
        peaks: dict[str, float] = {}
        for row in self.rows.values():
            name = json.loads(row["config"])["model"]["name"]
            peaks[name] = max(peaks.get(name, 0.0), row["peak_mb"])
        return peaks

    def _first_of_unknown_memory(self, cells: Mapping[str, Config]) -> str | None:
        known = self._peaks()
        return next((key for key, config in cells.items() if config.model.name not in known), None)

    def _fitting(self, cells: Mapping[str, Config]) -> int:
        known = self._peaks()
        peak = max(known.get(config.model.name, 0.0) for config in cells.values())
        room = MAX_MEMORY_SHARE * psutil.virtual_memory().available / 2**20
        return max(1, min(self._max_parallel(), int(room / peak) if peak else self._max_parallel()))


def _overrides(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in overrides.items()) or "no overrides"
