"""Runs a grid's cells, each once: those in the Parquet file are done, one that was interrupted goes on."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from fedelta.atomic import write_file
from fedelta.config import Config
from fedelta.engines.workers import Result, Workers, can_fork
from fedelta.errors import Diverged, FedeltaError, TooFewUpdates
from fedelta.runner import run
from fedelta.sweep.cells import Choice, Expansion, Plan, Trial, choose, choose_or_nothing
from fedelta.sweep.grid import Grid
from fedelta.sweep.observer import SweepObserver
from fedelta.sweep.results import Row, as_stored, first_difference, is_result_of, read_rows, row_of, write_rows
from fedelta.tracking import RunFolder

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
        observer: is told of progress.
    """

    def __init__(
        self,
        grid: Grid,
        expansion: Expansion,
        folder: Path,
        parallel: int | Literal["auto"] = "auto",
        keep: bool = False,
        observer: SweepObserver | None = None,
    ) -> None:
        self.grid = grid
        self.expansion = expansion
        self.parallel = parallel
        self.keep = keep
        self.observer = observer or SweepObserver()
        self.folder = folder
        self.running = self.folder / "running"
        self.rows: dict[str, Row] = {}

    def run(self) -> dict[str, Row]:
        """Run what has not been run: the trials, then, with what they decide, the experiments.

        Returns:
            Cell → row, of all that the file holds.

        Raises:
            FedeltaError: for bad input, naming the cell. Whatever had finished is kept.
        """
        self.expansion.check()
        with RunFolder(self.folder, {}).hold():
            self.rows = read_rows(self.folder)
            write_file(self.folder / "grid.yaml", yaml.safe_dump(self.grid.dump(), sort_keys=False))
            chosen: Mapping[str, Choice] = {}
            if self.grid.tuning is not None:
                plan, trials = self.expansion.trials()
                self._run_all("tuning", plan)
                chosen = self._chosen(trials)
            self._run_all("experiments", self.expansion.cells(chosen))
            if self.running.is_dir() and not any(self.running.iterdir()):
                self.running.rmdir()
        return self.rows

    def check(self, key: str) -> str | None:
        """Run a cell of the file again, from the beginning, and compare.

        Returns:
            The first difference, None where the new row is the old one.

        Raises:
            FedeltaError: for a cell that is not in the file, or not in the grid any more.
        """
        self.rows = read_rows(self.folder)
        plan, trials = self.expansion.trials()
        cells = plan.cells | self.expansion.cells(choose_or_nothing(self.grid, trials, self.rows)).cells
        if key not in self.rows or key not in cells:
            raise FedeltaError(f"no cell {key!r} in {self.folder}{' as the grid is now' if key in self.rows else ''}")
        shutil.rmtree(self.running / key, ignore_errors=True)
        config = self._placed(key, cells[key], 1)
        self.observer.planned(key, {key: config}, [key], self.running)
        row = as_stored(_run_cell(key, config))
        shutil.rmtree(self.running / key)
        return first_difference(self.rows[key], row)

    def _chosen(self, trials: Sequence[Trial]) -> Mapping[str, Choice]:
        assert self.grid.tuning is not None
        chosen = choose(trials, self.rows, self.grid.tuning.last)
        assert chosen is not None, "all trials have run"
        for value, choice in chosen.items():
            self.observer.say(f"chosen for {value}: {', '.join(f'{k} {v}' for k, v in choice.items())}")
        return chosen

    def _run_all(self, what: str, plan: Plan) -> None:
        left = {
            key: config
            for key, config in plan.cells.items()
            if key not in self.rows or not is_result_of(self.rows[key], config)
        }
        self.observer.planned(what, plan.cells, list(left), self.running)
        if left and self.parallel == "auto" and self._most() > 1 and not self._peaks(left):
            # How much memory a cell needs is seen from the first one.
            first = next(iter(left))
            self._run_some({first: left.pop(first)}, 1)
        if left:
            self._run_some(left, self.parallel if self.parallel != "auto" else self._fitting(left))

    def _run_some(self, cells: Mapping[str, Config], parallel: int) -> None:
        keys = list(cells)
        configs = {key: self._placed(key, config, parallel) for key, config in cells.items()}

        def work(i: int) -> Result:
            return Result({"row": _run_cell(keys[i], configs[keys[i]])})

        for i, result in Workers(parallel).as_completed(work, [1.0] * len(keys)):
            self.rows[keys[i]] = as_stored(result.facts["row"])
            write_rows(self.folder, self.rows)
            if not self.keep:
                shutil.rmtree(self.running / keys[i], ignore_errors=True)
            self.observer.cell_done(cells[keys[i]], self.rows[keys[i]])

    def _placed(self, key: str, config: Config, parallel: int) -> Config:
        """The same with its folder; where cells share the cores, each has one process."""
        workers = config.workers if parallel == 1 else 1
        return config.model_copy(update={"name": key, "output": str(self.running), "workers": workers})

    def _most(self) -> int:
        """Cells for which there are cores: a GPU serves one at a time."""
        import joblib

        return joblib.cpu_count(only_physical_cores=True) if can_fork() else 1

    def _peaks(self, cells: Mapping[str, Config]) -> list[float]:
        """MB that cells of these models have been seen to take; empty where one of them has never run."""
        found: dict[str, float] = {}
        for row in self.rows.values():
            name = yaml.safe_load(row["config"])["model"]["name"]
            found[name] = max(found.get(name, 0.0), row["peak_mb"])
        names = {config.model.name for config in cells.values()}
        return [found[name] for name in names] if names <= set(found) else []

    def _fitting(self, cells: Mapping[str, Config]) -> int:
        peaks = self._peaks(cells)
        if not peaks or not max(peaks):
            return 1 if not peaks else self._most()
        room = SPARE * psutil.virtual_memory().available / 2**20
        return max(1, min(self._most(), int(room / max(peaks))))


def _run_cell(key: str, config: Config) -> dict[str, Any]:
    """In whichever process: a cell to its end, from where it was left."""
    try:
        return row_of(key, config, run(config, resume=True))
    except (Diverged, TooFewUpdates) as error:
        # A result of these settings; anything else is wrong with the input, and ends the grid.
        return row_of(key, config, None, str(error))
    except FedeltaError as error:
        raise FedeltaError(f"cell {key}: {error}") from error
