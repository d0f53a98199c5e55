"""Running grids: each cell runs once, also after an interruption, with the same results in every way to run it."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from command import fedelta, refusal
from fedelta.cli.progress import GridProgress
from fedelta.errors import FedeltaError
from fedelta.runs.runner import run
from fedelta.sweep.cells import Expansion
from fedelta.sweep.grid import Grid, load_grid
from fedelta.sweep.observer import SweepObserver
from fedelta.sweep.report.results import gather
from fedelta.sweep.results import CIRCUMSTANCES, first_difference, read_rows, write_rows
from fedelta.sweep.runner import Sweep


@pytest.fixture(scope="module")
def grid(tiny_bert: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of two methods at two learning rates under two seeds, and a refresh: 6 cells and 4 trials."""
    data = {
        "name": "little",
        "seeds": [0, 1],
        "config": {
            "rounds": 3,
            "model": {"name": str(tiny_bert)},
            "lora": {"alpha": 8},
            "ranks": {"allocation": "fixed", "low": 2, "high": 4, "share": 0.5},
            "data": {"source": str(texts), "max_length": 16},
            "partition": {"kind": "natural", "by": "author", "clients": 4},
            "training": {"steps": 2, "batch_size": 8},
            "evaluation": {"clients": 1},
        },
        "axes": {
            "method": {"zero padding": {"method": "zero-padding"}, "FedEx": {"method": "fedex"}},
            "refresh": {"never": {}, "often": {"method.refresh": 1}},
        },
        "tuning": {
            "axes": ["method"],
            "search": {"training.learning_rate": [0.01, 0.02]},
            "seeds": [9],
            "config": {"rounds": 1},
        },
        "experiments": {
            "main": {
                "title": "Everything",
                "axes": {"method": "all"},
                "rows": "method",
                "show": [
                    *("score", "late-score", "rounds-to-target", "curves", "traffic", "energy", "deviation"),
                    "first-aggregation",
                ],
            },
            "restart": {"axes": {"method": "FedEx", "refresh": "all"}, "rows": "refresh"},
        },
    }
    path = tmp_path_factory.mktemp("grid") / "grid.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def straight(grid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the grid, with its cells run one at a time."""
    folder = tmp_path_factory.mktemp("straight")
    swept(grid, folder)
    return folder


@pytest.fixture
def done(straight: Path, tmp_path: Path) -> Path:
    """A copy of the results."""
    return Path(shutil.copytree(straight, tmp_path / "done"))


def swept(source: Path, folder: Path, parallel: int = 1) -> dict[str, Any]:
    grid = load_grid(source)
    return Sweep(grid, Expansion(grid), folder, parallel).run()


def results(folder: Path) -> dict[str, Any]:
    """The rows of the file without their circumstances."""
    return {
        key: {name: value for name, value in row.items() if name not in CIRCUMSTANCES}
        for key, row in read_rows(folder).items()
    }


def test_a_grid_ends_in_one_file_and_a_second_run_has_nothing_to_do(
    grid: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "little"
    rows = read_rows(done)
    assert len(rows) == 4 + 6
    # One trial and one cell of the experiments have not run.
    trials = Expansion(load_grid(grid)).trials()[0].cells
    last = [next(iter(trials)), list(rows)[-1]]
    write_rows(folder, {key: row for key, row in rows.items() if key not in last})
    command = ("sweep", str(grid), "-o", str(folder))
    assert fedelta(*command) == 0
    printed = capsys.readouterr()
    assert results(folder) == results(done)
    assert "tuning: 1 of 4 cells to run" in printed.err
    assert "experiments: 1 of 6 cells to run" in printed.err
    assert str(folder / "cells.parquet") in printed.out
    assert "Everything: test accuracy" in printed.out
    assert not (folder / "running").exists()
    assert sorted(path.name for path in folder.iterdir()) == [
        *("cells.md", "cells.parquet", "figures", "grid.yaml", "report.md", "tables"),
    ]
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert fedelta(*command) == 0
    assert "experiments: 0 of 6 cells to run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before

    # Everything else can be written again from the results.
    for name in ("tables", "figures"):
        shutil.rmtree(folder / name)
    (folder / "report.md").unlink()
    (folder / "cells.md").unlink()
    assert fedelta("report", str(folder)) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_the_file_of_results_has_a_column_for_each_axis(grid: Path, done: Path) -> None:
    table = pq.read_table(done / "cells.parquet").to_pandas().set_index("cell")
    assert {name for name in table if name.startswith("axis ")} == {f"axis {axis}" for axis in load_grid(grid).axes}
    trials, cells = Expansion(load_grid(grid)).decided(read_rows(done))
    for place in [*trials.places, *cells.places]:
        for axis, value in place.values.items():
            assert value in table.loc[place.key, f"axis {axis}"].split(", ")


def test_a_row_agrees_with_a_run_of_the_same_configuration(grid: Path, done: Path, tmp_path: Path) -> None:
    rows = read_rows(done)
    for key, config in Expansion(load_grid(grid)).trials()[0].cells.items():
        finished = run(config.model_copy(update={"name": key, "output": str(tmp_path / "runs")}))
        row = rows[key]
        assert row["test"] == finished.result["test"]
        assert row["lora_parameters"] == finished.result["lora_parameters"]
        (record,), (stored,) = finished.records, row["rounds"]
        assert stored["validation"] == record["validation"]
        assert stored["up"] | {"total": sum(stored["up"].values())} == record["bytes_up"]
        assert stored["deviation"] == pytest.approx(record["deviation"], rel=1e-6)
        assert row["scaled_deviation"][0] == pytest.approx(record["scaled_deviation"], rel=1e-6)
        assert {own["client"]: own["score"] for own in stored["own"]} == {
            client: scores["accuracy"] for client, scores in record["clients_validation"].items()
        }
        assert (row["method"], row["seed"], row["failed"]) == (config.method.name, 9, None)
        assert row["versions"]["torch"]
        assert rows[key]["seconds"] > 0


def test_cells_give_the_same_results_side_by_side_and_one_at_a_time(grid: Path, done: Path, tmp_path: Path) -> None:
    swept(grid, tmp_path / "two", parallel=2)
    assert results(tmp_path / "two") == results(done)


def test_a_killed_grid_resumes_from_its_last_finished_round(grid: Path, done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "fedelta.cli", "sweep", str(grid), "-o", str(folder), "--parallel", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def rounds() -> int:
        lines = 0
        for file in folder.glob("running/*/rounds.jsonl"):
            with suppress(FileNotFoundError):  # the cell has ended in the meantime
                lines += file.read_bytes().count(b"\n")
        return lines

    kills = 0
    for cells in (1, 5):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        # In the middle of a cell: after one of its rounds, and after `cells` finished cells.
        while process.poll() is None and not (len(read_rows(folder)) >= cells and rounds()):
            time.sleep(0.005)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills == 2
    assert cells <= len(read_rows(folder)) < 10
    left = 10 - len(read_rows(folder))
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert f"{left} of 6 cells to run" in finished.stderr
    assert results(folder) == results(done)


def test_a_cell_that_diverges_is_a_result_and_the_grid_continues(grid: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(grid.read_text())
    data["tuning"] = None
    data["axes"]["method"]["FedEx"]["training.learning_rate"] = 1e30
    source = tmp_path / "diverging.yaml"
    source.write_text(yaml.safe_dump(data, sort_keys=False))
    rows = swept(source, tmp_path / "some", parallel=2)
    failed = [row for row in rows.values() if row["failed"]]
    assert len(rows) == 6
    assert {row["method"] for row in failed} == {"fedex"}
    assert all("finite" in row["failed"] for row in failed)
    assert fedelta("report", str(tmp_path / "some")) == 0
    assert "–, 2 diverged" in (tmp_path / "some" / "tables" / "main-score.md").read_text()


def test_bad_input_ends_the_grid_with_one_line(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("sweep", str(grid), "-o", str(tmp_path / "little"))
    assert "unknown key 'training.step'; did you mean 'steps'" in refusal(capsys, *command, "training.step=1")
    assert not (tmp_path / "little").exists(), "no folder is left behind"
    assert "expected axis=value" in refusal(capsys, *command, "--where", "FedEx")
    assert fedelta(*command, "data.source=./nothing.csv", "--no-tuning") == 2
    printed = capsys.readouterr().err.splitlines()
    assert printed[-1] == "error: main: zero padding, seed 0: data source ./nothing.csv: no such file or folder"


def test_overrides_and_selections_come_from_the_command_line(grid: Path, tmp_path: Path) -> None:
    folder = tmp_path / "picked"
    options = ["--only", "restart", "--where", "refresh=often", "--no-tuning", "--keep", "-o", str(folder)]
    assert fedelta("sweep", str(grid), "rounds=1", "training.steps=1", *options) == 0
    rows = read_rows(folder)
    assert len(rows) == 2
    assert {len(row["rounds"]) for row in rows.values()} == {1}
    assert all(json.loads(row["config"])["training"]["steps"] == 1 for row in rows.values())
    assert all((folder / "running" / key / "adapter" / "adapter_model.safetensors").exists() for key in rows)
    # The overrides are stored with the results.
    assert fedelta("report", str(folder)) == 0
    assert "often" in (folder / "tables" / "restart-score.md").read_text()


def test_a_cell_run_again_is_compared_with_its_row(grid: Path, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_rows(done)
    key = next(key for key, row in rows.items() if len(row["rounds"]) == 3)
    command = ("sweep", str(grid), "-o", str(done), "--check")
    assert fedelta(*command, key) == 0
    assert f"cell {key}: same result" in capsys.readouterr().out
    # A file that is older than a setting has its default.
    older = json.loads(rows[key]["config"])
    del older["training"]["deterministic"]
    write_rows(done, rows | {key: rows[key] | {"config": json.dumps(older), "digest": None}})
    assert fedelta(*command, key) == 0
    rows[key]["rounds"][1]["train_loss"] += 1e-9
    write_rows(done, rows)
    capsys.readouterr()
    assert f"cell {key} is not what was written" in refusal(capsys, *command, key)
    rows[key]["digest"] = None
    write_rows(done, rows)
    assert fedelta(*command, key) == 2
    assert f"cell {key} gave a different result: rounds, first in round 2" in " ".join(capsys.readouterr().err.split())
    assert "no cell 'abc'" in refusal(capsys, *command, "abc")
    assert read_rows(done)[key] == rows[key], "a check does not write"


def test_rows_survive_writing_and_reading(done: Path, tmp_path: Path) -> None:
    again = read_rows(done)
    write_rows(tmp_path / "two", again)
    assert read_rows(tmp_path / "two") == again
    for key, row in again.items():
        assert first_difference(row, again[key]) is None
        other = {**row, "test": {**row["test"], "accuracy": 0.0}}
        assert str(first_difference(row, other)).startswith("test: ")


def test_a_damaged_file_is_named(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cells.parquet").write_bytes(b"PAR1 and then nothing")
    assert str(tmp_path / "cells.parquet") in refusal(capsys, "sweep", str(grid), "-o", str(tmp_path))


def test_memory_decides_how_many_cells_run_side_by_side(grid: Path, monkeypatch: Any) -> None:
    import psutil

    loaded: Grid = load_grid(grid)
    sweep = Sweep(loaded, Expansion(loaded), Path("unused"))
    cells = Expansion(loaded).cells(None).cells
    monkeypatch.setattr(Sweep, "_max_parallel", lambda _: 4)
    name = next(iter(cells.values())).model.name
    sweep.rows = {"a": {"config": json.dumps({"model": {"name": name}}), "peak_mb": 1000.0}}

    class Free:
        available = 0

    for free, expected in ((100, 1), (1300, 1), (2600, 2), (100_000, 4)):
        Free.available = free * 2**20
        monkeypatch.setattr(psutil, "virtual_memory", lambda: Free)
        assert sweep._fitting(cells) == expected
        assert sweep._first_of_unknown_memory(cells) is None
    sweep.rows = {"a": {"config": json.dumps({"model": {"name": "another"}}), "peak_mb": 1.0}}
    assert sweep._first_of_unknown_memory(cells) == next(iter(cells)), "the memory of this model is unknown"


def test_a_part_of_a_tuned_grid_is_tuned_and_shown(grid: Path, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    options = ["--where", "method=FedEx", "--only", "main", "-o", str(folder), "--parallel", "2"]
    assert fedelta("sweep", str(grid), *options) == 0
    assert len(read_rows(folder)) == 2 + 2
    page = (folder / "report.md").read_text()
    assert "FedEx" in (folder / "tables" / "main-score.md").read_text()
    assert "2 runs of this experiment are still missing" in page
    assert " *" in (folder / "tables" / "tuning.md").read_text()
    key = list(read_rows(folder))[-1]
    assert fedelta("sweep", str(grid), "--check", key, "-o", str(folder)) == 0


def test_untuned_results_are_never_shown_as_tuned_ones(grid: Path, tmp_path: Path) -> None:
    folder = tmp_path / "untuned"
    assert fedelta("sweep", str(grid), "--no-tuning", "-o", str(folder)) == 0
    loaded = load_grid(grid)
    assert all(results.cells.empty for results in gather(loaded, read_rows(folder)))


def test_results_of_other_overrides_are_not_mixed(grid: Path, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (done / "grid.yaml").read_bytes()
    line = refusal(capsys, "sweep", str(grid), "rounds=2", "-o", str(done))
    assert "holds results with no overrides, now rounds=2; choose another folder with --output" in line
    assert (done / "grid.yaml").read_bytes() == before


def test_a_failure_other_than_divergence_ends_the_grid(grid: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from fedelta.federation.client import Trainer

    def fail(*_: Any) -> bytes:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Trainer, "reply", fail)
    with pytest.raises(FedeltaError, match=r"main: .*seed 0: round 0: 0 usable updates.*out of memory"):
        swept_untuned(grid, tmp_path / "some")
    assert not read_rows(tmp_path / "some")


def swept_untuned(source: Path, folder: Path, **options: Any) -> dict[str, Any]:
    grid = load_grid(source).model_copy(update={"tuning": None})
    return Sweep(grid, Expansion(grid), folder, **options).run()


def test_lost_updates_are_reported_and_counted(grid: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from fedelta.federation.client import Trainer

    reply = Trainer.reply

    def sometimes(self: Trainer, blob: bytes, shard: Any) -> bytes:
        if b"client-002" in blob:
            raise RuntimeError("out of memory")
        return reply(self, blob, shard)

    class Recorder(SweepObserver):
        messages: ClassVar[list[str]] = []

        def say(self, message: str) -> None:
            self.messages.append(message)

    monkeypatch.setattr(Trainer, "reply", sometimes)
    rows = swept_untuned(grid, tmp_path / "some", parallel=2, observer=Recorder())
    assert {(r["sampled"], r["clients"]) for row in rows.values() for r in row["rounds"]} == {(4, 3)}
    assert any("client-002 skipped: RuntimeError: out of memory" in line for line in Recorder.messages)
    fedelta("report", str(tmp_path / "some"))
    assert "18 updates of clients were lost or refused" in (tmp_path / "some" / "report.md").read_text()


def test_tuning_fails_if_every_candidate_diverges_and_retry_runs_them_again(grid: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(grid.read_text())
    data["tuning"]["search"] = {"training.learning_rate": [1e30]}
    source, folder = tmp_path / "diverging.yaml", tmp_path / "some"
    source.write_text(yaml.safe_dump(data, sort_keys=False))
    with pytest.raises(FedeltaError, match="tuning: every candidate of zero padding diverged"):
        swept(source, folder, parallel=2)
    rows = read_rows(folder)
    assert len(rows) == 2
    assert all(row["failed"] for row in rows.values())
    loaded = load_grid(source)
    for retry, left in ((False, 0), (True, 2)):
        sweep = Sweep(loaded, Expansion(loaded), folder, 1, retry=retry)
        sweep.rows = rows
        plan = Expansion(loaded).trials()[0]
        assert sum(not sweep._is_done(key, config) for key, config in plan.cells.items()) == left


def test_cells_with_several_threads_run_one_at_a_time(grid: Path, tmp_path: Path) -> None:
    loaded = load_grid(grid)
    loaded = loaded.model_copy(update={"config": {**loaded.config, "threads": 2, "workers": 1}})
    with pytest.raises(FedeltaError, match="cells with threads: 2 run one at a time"):
        Sweep(loaded, Expansion(loaded), tmp_path, 2).run()
    assert Sweep(loaded, Expansion(loaded), tmp_path)._max_parallel() == 1


def test_progress_is_shown_on_a_terminal(tmp_path: Path) -> None:
    from fedelta.runs.config import parse_config

    console = Console(force_terminal=True, file=io.StringIO(), width=120)
    cells = {key: parse_config({"rounds": 4}) for key in "abc"}
    row = {"metric": "accuracy", "validation": {"accuracy": 0.5}}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "rounds.jsonl").write_text("{}\n{}\n")
    with GridProgress(console) as progress:
        progress.planned("experiments", cells, ["b", "c"], tmp_path)
        bars = {task.description: task for task in progress.progress.tasks}
        assert (bars["rounds"].completed, bars["rounds"].total) == (4 + 2, 12)
        (tmp_path / "b" / "rounds.jsonl").write_text("{}\n{}\n{}\n")
        deadline = time.monotonic() + 20
        while bars["rounds"].completed != 4 + 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert bars["rounds"].completed == 4 + 3
        # Finished cells whose folders remain count once.
        progress.cell_done("b", "main: x", row)
        progress.cell_done("c", "main: y", row)
        assert bars["experiments"].completed == 3
    assert "2 of 3 cells to run" in console.file.getvalue()  # type: ignore[attr-defined]


def test_cells_on_a_gpu_run_one_at_a_time(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although the process that forks them has not used the GPU yet."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    command = ("sweep", str(grid), "-o", str(tmp_path / "out"), "--parallel", "2")
    assert "--parallel 2 needs Linux, and cells that run on the CPU; expected 1" in refusal(capsys, *command)
    assert Sweep(load_grid(grid), Expansion(load_grid(grid)), tmp_path / "out", "auto")._max_parallel() == 1
    on_cpu = load_grid(grid).model_copy(update={"overrides": {"model.device": "cpu"}})
    assert not Sweep(on_cpu, Expansion(on_cpu), tmp_path / "out", "auto")._on_gpu()
