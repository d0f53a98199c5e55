"""The examples in the docstrings of the lora package run and print what they say."""

import doctest
import importlib
from types import ModuleType

import pytest

MODULES = ("adapter", "lowrank", "patch_log", "rank_moments")


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    module: ModuleType = importlib.import_module(f"fedelta.lora.{name}")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
