"""The examples in the docstrings of the methods package run and print what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["fedelta.methods", "fedelta.methods.residual_cut"])
def test_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
