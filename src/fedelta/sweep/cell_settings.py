"""The settings of each cell of a grid, as plain data. This module does not import torch."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeVar

from fedelta.runs.config_file import set_key
from fedelta.runs.early_check import check_early
from fedelta.sweep.grid import Grid

T = TypeVar("T")
MAX_EARLY = 2000
"""Cells that are checked before torch is imported; the others are checked after it, like all of them."""


def cell_settings(
    grid: Grid, values: Mapping[str, str], own: Mapping[str, Any], choice: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """Lay the keys of a grid, of values of its axes, of an experiment and of a choice over one another.

    Args:
        grid: the grid.
        values: axis → value.
        own: keys of the experiment, or of the trials.
        choice: key → value that tuning has chosen or tries.

    Returns:
        Keys and values, and the name of the cell in error messages.
    """
    data: dict[str, Any] = {}
    for layer in [grid.config, *(grid.axes[axis][values[axis]] for axis in grid.axes if axis in values), own]:
        _apply(data, layer)
    for key, value in [*choice.items(), *grid.overrides.items()]:
        set_key(data, key, value)
    label = ", ".join(f"{axis} {value}" for axis, value in values.items())
    return data, f"grid {grid.name}, {label}"


def _apply(data: dict[str, Any], layer: Mapping[str, Any], prefix: str = "") -> None:
    """Set each key of a nested or dotted layer and keep the other keys."""
    for key, value in layer.items():
        if isinstance(value, Mapping) and value:
            _apply(data, value, f"{prefix}{key}.")
        else:
            set_key(data, prefix + key, deepcopy(value))


def crossed(axes: Mapping[str, Sequence[T]]) -> Iterator[dict[str, T]]:
    """Yield axis → value for each combination of the values of some axes."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def check_cells_early(grid: Grid, only: Sequence[str] = ()) -> None:
    """Check the settings of the cells and trials of a grid, apart from rules about several keys.

    Args:
        grid: the grid.
        only: names of experiments; empty means all.

    Raises:
        FedeltaError: naming the first cell with a mistake.
    """
    for data, name in itertools.islice(_all_settings(grid, only), MAX_EARLY):
        check_early(data, name)


def _all_settings(grid: Grid, only: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    for name, experiment in grid.experiments.items():
        if not only or name in only:
            for values in crossed(experiment.axes):
                yield cell_settings(grid, values, experiment.config, {})
    if grid.tuning is not None:
        for values in crossed({axis: tuple(grid.axes[axis]) for axis in grid.tuning.axes}):
            for choice in crossed(grid.tuning.search):
                yield cell_settings(grid, grid.tuning.at | values, grid.tuning.config, choice)
