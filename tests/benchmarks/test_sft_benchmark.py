"""The benchmark beside TRL, with a small model, small data and one step."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from causal import TASK
from fedelta.learning.data import DataSettings
from fedelta.learning.tasks import Completion
from paths import ROOT


def test_the_benchmark_trains_the_same_steps_in_each_way(
    causal: Any, things: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("sft_trainer")
    monkeypatch.setattr(benchmark, "DATA", DataSettings(source=str(things), max_length=32))
    monkeypatch.setattr(benchmark, "TASK", Completion(**TASK))
    cells = benchmark.row(str(causal("llama")), "float32", batch=3, steps=1, turns=1)
    named = dict(zip(benchmark.HEAD, cells, strict=True))
    assert float(named["TRL, tokens/s"]) > 0
    assert float(named["fedelta"].split("×")[0]) > 0
    assert float(named["fedelta, `packing: true`"].split("×")[0]) > 0
    assert float(named["largest relative difference of losses"]) < 1e-5
