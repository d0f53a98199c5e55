"""The command `fedelta sweep`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedelta.cli.printing import print_path, print_text
from fedelta.cli.terminal import AcceptChangedData, err, names, out
from fedelta.errors import FedeltaError


def sweep(
    source: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="File that describes the grid.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]…", help="Settings of every cell, over those of the grid.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="One of the grid's sizes; default: the first.")] = None,
    only: Annotated[str | None, typer.Option(help="Experiments, separated by commas.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="axis=value: of experiments with this axis, run these cells only; may be repeated."),
    ] = None,
    tuning: Annotated[bool, typer.Option(help="Run the grid's trials first and use what they choose.")] = True,
    parallel: Annotated[
        int | None, typer.Option(help="Cells at once; default: as many as cores and memory allow.", min=1)
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the results.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the run folder of each cell.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run cells that diverged again.")] = False,
    accept_changed_data: AcceptChangedData = False,
    check: Annotated[str | None, typer.Option(help="Run this cell (cells.md names them) again and compare.")] = None,
) -> None:
    """Run each cell of a grid of configurations once; write a Parquet file, tables and figures (docs/grids.md)."""
    from fedelta.runs.config_file import read_override
    from fedelta.sweep.cell_settings import check_cells_early
    from fedelta.sweep.grid import load_grid

    grid = load_grid(source, size)
    changes: dict[str, Any] = {"overrides": grid.overrides | dict(map(read_override, overrides or []))}
    if not tuning:
        changes["tuning"] = None
    grid = grid.model_copy(update=changes)
    check_cells_early(grid, names(only or ""))

    from fedelta.cli.progress import GridProgress
    from fedelta.sweep.cells import Expansion
    from fedelta.sweep.runner import Sweep

    expansion = Expansion(grid, names(only or ""), _wanted(where or []))
    with GridProgress(err) as progress:
        place = output or grid.folder
        sweep = Sweep(grid, expansion, place, parallel or "auto", keep, retry, progress, accept_changed_data)
        if check is not None:
            difference = sweep.check(check)
            if difference is not None:
                raise FedeltaError(f"cell {check} gave a different result: {difference}")
        else:
            rows = sweep.run()
    if check is not None:
        print_text(out, f"cell {check}: same result")
        return
    print_grid_report(grid, rows, sweep.folder)


def print_grid_report(grid: Any, rows: Any, folder: Path) -> None:
    """Write the tables, figures and page of a grid into the folder, and print the tables."""
    from fedelta.sweep.report.report import write_grid_report
    from fedelta.sweep.results import FILE

    tables, page = write_grid_report(grid, rows, folder)
    for table in tables:
        out.print(table.console())
    print_path(out, "results", folder / FILE)
    print_path(out, "report", page)


def _wanted(conditions: list[str]) -> dict[str, list[str]]:
    wanted: dict[str, list[str]] = {}
    for condition in conditions:
        axis, equals, value = condition.partition("=")
        if not equals or not axis:
            raise FedeltaError(f"--where {condition!r}: expected axis=value")
        wanted.setdefault(axis, []).append(value)
    return wanted
