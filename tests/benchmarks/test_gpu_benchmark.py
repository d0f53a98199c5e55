"""The GPU benchmark, run on a CPU with toy sizes to check that it works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paths import ROOT

MIN_ROWS = {"tests": 1, "training": 8, "stacks": 8, "round": 20, "fold": 5, "experiments": 20}
"""Section → its minimum number of figures."""


def test_the_benchmark_measures_all_of_its_sections(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--smoke", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    report = (tmp_path / "gpu.md").read_text()
    assert results["header"]["bf16 peak, TFLOP/s (a large square product)"] > 0
    assert list(results["sections"]) == list(MIN_ROWS)
    for name, section in results["sections"].items():
        assert section["failed"] == [], (name, section["failed"])
        assert section["not_reached"] == []
        assert len(section["rows"]) >= MIN_ROWS[name], name
        assert f"## {section['title']}" in report
    tests = results["sections"]["tests"]["rows"][0]
    assert tests["passed"] >= 15
    assert tests["failed"] == tests["error"] == 0
    for row in results["sections"]["training"]["rows"]:
        assert row["tokens/s"] > 0
    assert {row["way"] for row in results["sections"]["training"]["rows"]} == {
        "plain PEFT loop",
        "fedelta",
        "fedelta, deterministic: false",
        "transformers.Trainer",
    }
    hours = [row["hours"] for row in results["sections"]["experiments"]["rows"] if row["grid"] == "all grids"]
    assert len(hours) == 1
    assert hours[0] > 0


def test_without_a_gpu_the_error_names_the_smoke_option(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(tmp_path / "none")]
    # Hide all devices of this machine.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "torch finds no CUDA device; --smoke tries the benchmark on a CPU" in done.stderr
    assert not (tmp_path / "none").exists()


@pytest.fixture
def report_module(monkeypatch: pytest.MonkeyPatch) -> object:
    """The module `benchmarks/gpu_report.py`, imported from its folder."""
    import importlib

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_report")


def test_a_failed_or_omitted_figure_is_reported_without_loss_of_the_others(
    report_module: object, tmp_path: Path
) -> None:
    import torch

    bench = report_module.Bench(tmp_path, 10.0, torch.device("cpu"), True)  # type: ignore[attr-defined]
    bench.begin("one", "One", "A section.")

    def fail() -> None:
        raise torch.OutOfMemoryError("out of memory\nand more")

    assert not bench.measure("broken", 1.0, fail)
    assert not bench.measure("too long", 601.0, lambda: {"value": 1})
    assert bench.measure("good", 1.0, lambda: {"value": 0.12345})
    section = json.loads((tmp_path / "gpu.json").read_text())["sections"]["one"]
    assert section["rows"] == [{"value": 0.12345}]
    assert section["failed"] == [{"what": "broken", "reason": "OutOfMemoryError: out of memory and more"}]
    assert section["not_reached"] == ["too long"]
    report = (tmp_path / "gpu.md").read_text()
    assert "| 0.123 |" in report
    assert "- failed: broken: OutOfMemoryError: out of memory and more" in report
    assert "- not reached: too long" in report
