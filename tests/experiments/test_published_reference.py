"""The published code of FedEx-LoRA is wrong for a Linear layer and right for a Conv1D layer; ours is right for both."""

import subprocess
import sys
from runpy import run_path

import pytest

from paths import ROOT

SCRIPT = ROOT / "experiments" / "exact_aggregation" / "published_reference.py"
MODULE = run_path(str(SCRIPT))


@pytest.mark.parametrize("seed", range(3))
def test_the_transposed_residual_is_wrong_on_linear_layers(seed: int) -> None:
    errors = MODULE["errors"](MODULE["published"], "BERT", seed)
    for name, error in errors.items():
        if "dense" in name:
            assert error == "torch refuses (64, 96) on (96, 64)"
        else:
            assert 0.1 < error < 1
    assert all(error < 1e-6 for error in MODULE["errors"](MODULE["ours"], "BERT", seed).values())


@pytest.mark.parametrize("seed", range(3))
def test_on_conv1d_both_are_exact(seed: int) -> None:
    for step in ("published", "ours"):
        errors = MODULE["errors"](MODULE[step], "GPT-2", seed)
        assert len(errors) == 2
        assert all(error < 1e-6 for error in errors.values())


def test_one_command_prints_the_errors() -> None:
    printed = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=True).stdout
    assert "| published |" in " ".join(printed.split())
    assert "Conv1D 192×64" in printed
