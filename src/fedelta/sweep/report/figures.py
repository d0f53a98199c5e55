"""Figures of a grid's experiments, as SVG and PNG."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from fedelta.runs.report import statistics
from fedelta.runs.report.plot import draw_curve, pyplot, save
from fedelta.sweep.report.differences import over_rounds
from fedelta.sweep.report.results import Results, deviations, mean_by_module, mean_by_round, shares_of_energy

ACROSS = 2
"""Panels beside each other."""
CROWD = 6
"""Lines up to which each has a band around it."""


def curves(results: Results, folder: Path) -> list[Path]:
    """Validation score by round: a panel for each column of the tables, a line for each row."""
    figure, grid = _panels(len(results.panels), ACROSS, (5.4, 3.8))
    for axes, panel in zip(grid, results.panels, strict=False):
        for i, row in enumerate(results.rows):
            found = mean_by_round(list(results.trained(row, panel).values()))
            points = [(number, mean(values), _band(values, len(results.rows))) for number, values in found]
            if points:
                draw_curve(axes, points, label=results.label(row), **_style(i, len(results.rows)))
        spreads = ", ± s.d." if len(results.rows) <= CROWD else ""
        axes.set(title=panel.label, ylabel=f"validation {results.metric(panel).title}{spreads}")
    _legend(figure, grid)
    return save(_titled(figure, results), folder, f"{results.name}-curves")


def energy(results: Results, folder: Path) -> list[Path]:
    """The share of each rank index in the adapter's energy over the rounds; a panel for each row, first column.

    Methods that merge the adapter every round have none to show.
    """
    from matplotlib.colors import LogNorm

    cells = {row: results.trained(row, results.panels[0]).values() for row in results.rows}
    rows = [row for row, found in cells.items() if any(any(r["energy"]) for cell in found for r in cell["rounds"])]
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
        shown = axes.imshow(
            image, aspect="auto", origin="lower", cmap="magma", norm=LogNorm(1e-5, 1), interpolation="nearest"
        )
        shown.set_extent((0.5, len(image[0]) + 0.5, 0.5, width + 0.5))
        axes.set_facecolor("black")  # nothing at all
        axes.set(title=results.label(row), xlabel="round", ylabel="rank index")
    figure.colorbar(shown, ax=grid, label="share of energy")
    return save(_titled(figure, results, results.panels[0].label), folder, f"{results.name}-energy")


def deviation(results: Results, folder: Path) -> list[Path]:
    """What averaging the factors apart would lose, layer by layer: mean over rounds and seeds."""
    return _deviations(results, folder, "deviation", _draw_by_module)


def deviation_by_round(results: Results, folder: Path) -> list[Path]:
    """The same by round, mean over modules: a panel for each column of the tables, a line for each row."""
    return _deviations(results, folder, "deviation-by-round", _draw_by_round)


def difference_by_round(results: Results, folder: Path) -> list[Path]:
    """Each row's validation score less the baseline's, over all columns, with the 95 % interval."""
    factor = results.metrics[0].factor
    others = [row for row in results.rows if row != results.baseline]
    lines = []
    for row in others:
        found = [(number, one) for number, one in over_rounds(results, row).items() if one]
        lines.append([(number, factor * one.mean, factor * (one.high - one.low) / 2) for number, one in found])
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
    """One figure of relative deviations, and one of scaled ones where they were measured."""
    paths = []
    for kind, label in (("relative", "‖ΔW − B̄Ā‖ / ‖ΔW‖"), ("scaled", "‖ΔW − B̄Ā‖ / √(mn)")):
        # One scale, or half as much would look like as much.
        figure, grid = _panels(len(results.panels), ACROSS, (5.4, 3.8), share=True)
        drawn = False
        for axes, panel in zip(grid, results.panels, strict=False):
            for i, row in enumerate(results.rows):
                found = [deviations(cell, kind) for cell in results.trained(row, panel).values()]
                if any(value for cell in found for by_module in cell for value in by_module.values()):
                    drawn = True
                    draw(axes, found, results.label(row), i, len(results.rows))
                elif any(map(any, found)):
                    axes.plot([], [], " ", label=f"{results.label(row)}: 0")
            axes.set(title=panel.label, ylabel=label)
        # When all is drawn: a limit on one panel ends the growing of the scale that they share.
        grid[0].set_ylim(bottom=0)
        if drawn:
            _legend(figure, grid)
            suffix = "" if kind == "relative" else f"-{kind}"
            paths += save(_titled(figure, results), folder, f"{results.name}-{name}{suffix}")
        else:
            pyplot().close(figure)
    return paths


def _draw_by_module(axes: Any, cells: Sequence[Sequence[Mapping[str, float]]], label: str, i: int, count: int) -> None:
    found = mean_by_module(cells)
    modules = in_depth(found)
    style = {"markersize": 3, "label": label, **_style(i, count)}
    axes.plot(range(len(modules)), [found[module] for module in modules], **style)
    axes.set_xticks(range(len(modules)), short_names(modules), rotation=60, ha="right")
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(alpha=0.25)


def in_depth(modules: Iterable[str]) -> list[str]:
    """By the numbers in their names: layer 2 before layer 10."""

    def place(module: str) -> list[tuple[int, str]]:
        return [(len(part) if part.isdigit() else 0, part) for part in module.split(".")]

    return sorted(modules, key=place)


def _draw_by_round(axes: Any, cells: Sequence[Sequence[Mapping[str, float]]], label: str, i: int, count: int) -> None:
    by_round: dict[int, list[float]] = {}
    for cell in cells:
        for number, by_module in enumerate(cell, 1):
            if by_module:
                by_round.setdefault(number, []).append(mean(by_module.values()))
    points = [(number, mean(found), _band(found, count)) for number, found in sorted(by_round.items())]
    draw_curve(axes, points, label=label, **_style(i, count))


def short_names(modules: Sequence[str]) -> list[str]:
    """The number of the layer, and as much of a module's own name as tells it from the others of its layer."""
    split = [[part for part in module.split(".") if not part.isdigit()] for module in modules]
    numbers = [[part for part in module.split(".") if part.isdigit()] for module in modules]
    for length in range(1, max(map(len, split), default=0) + 1):
        names = [" ".join([*number, ".".join(parts[-length:])]) for number, parts in zip(numbers, split, strict=True)]
        if len(set(names)) == len(names):
            return names
    return list(modules)


def _style(i: int, count: int) -> dict[str, Any]:
    """Colors, and in a crowd other markers and dashes, that tell lines apart, and no bands over each other."""
    style = {"color": pyplot().get_cmap("tab10").colors[i % 10], "linewidth": 1.3, "marker": "o"}
    if count > CROWD:
        style |= {"marker": "osDv^Px*"[i % 8], "linestyle": "--" if i >= CROWD else "-"}
    return style


def _band(values: Sequence[float], count: int) -> float:
    return statistics.deviation(values) if count <= CROWD else 0.0


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
    handles, labels = max((axes.get_legend_handles_labels() for axes in grid), key=lambda found: len(found[0]))
    if handles:
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)


def _titled(figure: Any, results: Results, panel: str = "") -> Any:
    left = f" ({results.missing} runs still missing)" if results.missing else ""
    figure.suptitle(results.title + (f": {panel}" if panel else "") + left, fontsize=11, wrap=True)
    return figure
