"""The command line of grids."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedelta.cli.terminal import err, names, out
from fedelta.errors import FedeltaError


def sweep(
    source: Annotated[Path, typer.Argument(metavar="GRID.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]…", help="Of every cell's configuration.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="One of the grid's sizes; none: the first.")] = None,
    only: Annotated[str | None, typer.Option(help="Experiments, separated by commas.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="axis=value: of experiments with this axis, these cells alone; may be repeated."),
    ] = None,
    tuning: Annotated[bool, typer.Option(help="Choose by the grid's trials first.")] = True,
    parallel: Annotated[int | None, typer.Option(help="Cells at once; none: as cores and memory allow.", min=1)] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the results.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the run folder of each cell.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run cells again that diverged.")] = False,
    check: Annotated[str | None, typer.Option(help="Run this cell (cells.md names them) again and compare.")] = None,
) -> None:
    """Run a grid of configurations, each cell once: one Parquet file, tables and figures (docs/grids.md)."""
    from fedelta.cli.progress import GridProgress
    from fedelta.runs.config import read_override
    from fedelta.sweep.cells import Expansion
    from fedelta.sweep.grid import load_grid
    from fedelta.sweep.runner import Sweep

    grid = load_grid(source, size)
    changes: dict[str, Any] = {"overrides": grid.overrides | dict(map(read_override, overrides or []))}
    if not tuning:
        changes["tuning"] = None
    grid = grid.model_copy(update=changes)
    expansion = Expansion(grid, names(only or ""), _wanted(where or []))
    with GridProgress(err) as progress:
        sweep = Sweep(grid, expansion, output or grid.folder, parallel or "auto", keep, retry, progress)
        if check is not None:
            difference = sweep.check(check)
            if difference is not None:
                raise FedeltaError(f"cell {check} came out otherwise: {difference}")
        else:
            rows = sweep.run()
    if check is not None:
        out.print(f"cell {check}: the same again", highlight=False)
        return
    show(grid, rows, sweep.folder)


def show(grid: Any, rows: Any, folder: Path) -> None:
    """Tables on the terminal; tables, figures and page in the folder."""
    from fedelta.sweep.report.report import write_grid_report
    from fedelta.sweep.results import FILE

    tables, page = write_grid_report(grid, rows, folder)
    for table in tables:
        out.print(table.console())
    out.print("results  ", folder / FILE, highlight=False, soft_wrap=True)
    out.print("report   ", page, highlight=False, soft_wrap=True)


def _wanted(conditions: list[str]) -> dict[str, list[str]]:
    wanted: dict[str, list[str]] = {}
    for condition in conditions:
        axis, equals, value = condition.partition("=")
        if not equals or not axis:
            raise FedeltaError(f"--where {condition!r}: expected axis=value")
        wanted.setdefault(axis, []).append(value)
    return wanted
