"""Figures of a grid's experiments, as SVG and PNG."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd

from fedelta.errors import quantity
from fedelta.runs.report import statistics
from fedelta.runs.report.plot import draw_curve, pyplot, save
from fedelta.sweep.report.differences import over_rounds
from fedelta.sweep.report.results import Panel, Results, shares_of_energy

MAX_ACROSS = 2
"""Panels beside each other."""
MAX_BANDS = 6
"""Number of lines up to which each line has a band around it."""


def curves(results: Results, folder: Path) -> list[Path]:
    """Draw the validation score by round, with a panel per column of the tables and a line per row."""
    evaluations = results.evaluations()
    figure, grid = _panels(len(results.panels), MAX_ACROSS, (5.4, 3.8))
    for axes, panel in zip(grid, results.panels, strict=False):
        for i, row in enumerate(results.rows):
            points = _points(_select(evaluations, row, panel), len(results.rows))
            if points:
                draw_curve(axes, points, label=results.label(row), **_style(i, len(results.rows)))
        spreads = ", ± s.d." if len(results.rows) <= MAX_BANDS else ""
        axes.set(title=panel.label, ylabel=f"validation {results.metric(panel).title}{spreads}")
    _legend(figure, grid)
    return save(_titled(figure, results), folder, f"{results.name}-curves")


def energy(results: Results, folder: Path) -> list[Path]:
    """Draw the share of each rank index in the adapter's energy over the rounds, with a panel per row, first column.

    Methods that merge the adapter every round have no energy to show and are left out.
    """
    from matplotlib.colors import LogNorm

    cells = {row: results.trained_cells(row, results.panels[0]) for row in results.rows}
    rows = [row for row, ran in cells.items() if any(any(r["energy"]) for cell in ran for r in cell["rounds"])]
    if not rows:
        return []
    figure, grid = _panels(len(rows), 4, (3.1, 2.6))
    for axes, row in zip(grid, rows, strict=False):
        seeds = [shares_of_energy(cell) for cell in cells[row]]
        width = max(len(shares) for seed in seeds for shares in seed)
        image = [
            [mean(seed[r][j] if j < len(seed[r]) else 0.0 for seed in seeds) for r in range(len(seeds[0]))]
            for j in range(width)
        ]
        picture = axes.imshow(
            image, aspect="auto", origin="lower", cmap="magma", norm=LogNorm(1e-5, 1), interpolation="nearest"
        )
        picture.set_extent((0.5, len(image[0]) + 0.5, 0.5, width + 0.5))
        axes.set_facecolor("black")  # a share of zero
        axes.set(title=results.label(row), xlabel="round", ylabel="rank index")
    figure.colorbar(picture, ax=grid, label="share of energy")
    return save(_titled(figure, results, results.panels[0].label), folder, f"{results.name}-energy")


def deviation(results: Results, folder: Path) -> list[Path]:
    """Draw the loss from averaging the factors separately by module, mean over rounds and seeds."""
    return _deviations(results, folder, "deviation", _draw_by_module)


def deviation_by_round(results: Results, folder: Path) -> list[Path]:
    """Draw the same loss by round, mean over modules, with a panel per column of the tables and a line per row."""
    return _deviations(results, folder, "deviation-by-round", _draw_by_round)


def difference_by_round(results: Results, folder: Path) -> list[Path]:
    """Draw each row's validation score minus the baseline's, over all panels, with the 95 % interval."""
    factor = results.metrics[0].factor
    others = [row for row in results.rows if row != results.baseline]
    lines = []
    for row in others:
        tested = [(number, one) for number, one in over_rounds(results, row).items() if one]
        lines.append([(number, factor * one.mean, factor * (one.high - one.low) / 2) for number, one in tested])
    if not any(lines):
        return []
    figure, (axes,) = _panels(1, 1, (6.4, 4.0))
    for i, (row, points) in enumerate(zip(others, lines, strict=True)):
        if points:
            draw_curve(axes, points, label=results.label(row), **_style(i, len(others)))
    axes.axhline(0, color="black", linewidth=0.8)
    unit = "points" if factor == 100 else "units of the score"
    axes.set(ylabel=f"validation less {results.label(results.baseline)}'s,\n{unit}; 95 % interval")
    _legend(figure, [axes])
    return save(_titled(figure, results), folder, f"{results.name}-difference-by-round")


def _deviations(results: Results, folder: Path, name: str, draw: Callable[..., None]) -> list[Path]:
    """Draw a figure of relative deviations, and one of scaled deviations if they were measured."""
    paths = []
    for kind, label in (("relative", "‖ΔW − B̄Ā‖ / ‖ΔW‖"), ("scaled", "‖ΔW − B̄Ā‖ / √(mn)")):
        # One scale for all panels; otherwise a deviation of half the size would look the same.
        deviations = results.deviations(kind)
        figure, grid = _panels(len(results.panels), MAX_ACROSS, (5.4, 3.8), share=True)
        drawn = False
        for axes, panel in zip(grid, results.panels, strict=False):
            for i, row in enumerate(results.rows):
                mine = _select(deviations, row, panel)
                if mine["value"].any():
                    drawn = True
                    draw(axes, mine, results.label(row), i, len(results.rows))
                elif not mine.empty:
                    axes.plot([], [], " ", label=f"{results.label(row)}: 0")
            axes.set(title=panel.label, ylabel=label)
        # Only after all panels are drawn: a limit on one panel stops the shared scale from growing.
        grid[0].set_ylim(bottom=0)
        if drawn:
            _legend(figure, grid)
            suffix = "" if kind == "relative" else f"-{kind}"
            paths += save(_titled(figure, results), folder, f"{results.name}-{name}{suffix}")
        else:
            pyplot().close(figure)
    return paths


def _select(values: pd.DataFrame, row: str, panel: Panel) -> pd.DataFrame:
    """The lines of a table that belong to a row in a panel."""
    return values[(values["row"] == row) & (values["panel"] == panel)]


def _points(values: pd.DataFrame, count: int) -> list[tuple[int, float, float]]:
    """(round, mean over seeds, half the height of the band) of each round.

    Args:
        values: one value per seed and round, with the columns round and value.
        count: number of lines in the panel.
    """
    return [(int(number), mean(seeds), _band(list(seeds), count)) for number, seeds in values.groupby("round")["value"]]


def _draw_by_module(axes: Any, deviations: pd.DataFrame, label: str, i: int, count: int) -> None:
    means = deviations.groupby("module")["value"].mean()
    modules = in_depth(means.index)
    style = {"markersize": 3, "label": label, **_style(i, count)}
    axes.plot(range(len(modules)), list(means[modules]), **style)
    axes.set_xticks(range(len(modules)), short_names(modules), rotation=60, ha="right")
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(alpha=0.25)


def in_depth(modules: Iterable[str]) -> list[str]:
    """Sort modules by the numbers in their names, with layer 2 before layer 10."""

    def position(module: str) -> list[tuple[int, str]]:
        return [(len(part) if part.isdigit() else 0, part) for part in module.split(".")]

    return sorted(modules, key=position)


def _draw_by_round(axes: Any, deviations: pd.DataFrame, label: str, i: int, count: int) -> None:
    by_seed = deviations.groupby(["round", "seed"], as_index=False)["value"].mean()
    draw_curve(axes, _points(by_seed, count), label=label, **_style(i, count))


def short_names(modules: Sequence[str]) -> list[str]:
    """Shorten names of modules to the layer's number and the shortest ending that is unique within the layer."""
    split = [[part for part in module.split(".") if not part.isdigit()] for module in modules]
    numbers = [[part for part in module.split(".") if part.isdigit()] for module in modules]
    for length in range(1, max(map(len, split), default=0) + 1):
        names = [" ".join([*number, ".".join(parts[-length:])]) for number, parts in zip(numbers, split, strict=True)]
        if len(set(names)) == len(names):
            return names
    return list(modules)


def _style(i: int, count: int) -> dict[str, Any]:
    """Color of a line, and its own marker and dashes if there are too many lines for bands."""
    style = {"color": pyplot().get_cmap("tab10").colors[i % 10], "linewidth": 1.3, "marker": "o"}
    if count > MAX_BANDS:
        style |= {"marker": "osDv^Px*"[i % 8], "linestyle": "--" if i >= MAX_BANDS else "-"}
    return style


def _band(values: Sequence[float], count: int) -> float:
    return statistics.deviation(values) if count <= MAX_BANDS else 0.0


def _panels(count: int, across: int, size: tuple[float, float], share: bool = False) -> tuple[Any, list[Any]]:
    across = min(count, across)
    down = -(-count // across)
    figure, grid = pyplot().subplots(
        down, across, figsize=(size[0] * across, size[1] * down), layout="constrained", squeeze=False, sharey=share
    )
    flat = list(grid.flat)
    for empty in flat[count:]:
        empty.set_visible(False)
    return figure, flat[:count]


def _legend(figure: Any, grid: list[Any]) -> None:
    handles, labels = max((axes.get_legend_handles_labels() for axes in grid), key=lambda legend: len(legend[0]))
    if handles:
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)


def _titled(figure: Any, results: Results, panel: str = "") -> Any:
    missing = f" ({quantity(results.missing, 'run')} still missing)" if results.missing else ""
    figure.suptitle(results.title + (f": {panel}" if panel else "") + missing, fontsize=11, wrap=True)
    return figure
