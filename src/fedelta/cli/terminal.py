"""What the commands share: the two consoles, how a configuration is named, and how finished runs are shown."""

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedelta.errors import FedeltaError

out, err = Console(), Console(stderr=True)

Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG.yaml] [key=value]…", help="No file: the built-in example."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last finished round, if there is one.")]


def names(text: str) -> list[str]:
    """Those in a list separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def flower_part(part: str) -> Any:
    """A part of Flower's engine, if that is installed."""
    try:
        return importlib.import_module(f"fedelta.flower.{part}")
    except ModuleNotFoundError as error:
        raise FedeltaError(f"this needs the extra: pip install 'fedelta[flower]' ({error})") from error


def read_config(arguments: list[str] | None) -> Any:
    """The configuration that a command names: a file or the built-in example, and key=value after it."""
    from fedelta.runs.config import load_config

    arguments = list(arguments or [])
    source = Path(arguments.pop(0)) if arguments and "=" not in arguments[0] else None
    return load_config(source, arguments)


def finish(runs: list[Any], folder: Path) -> None:
    """Table on the terminal; plot, table and page in the folder."""
    from fedelta.runs.report.page import write_page
    from fedelta.runs.report.plot import plot_scores
    from fedelta.runs.report.summary import console_table, write_table

    write_table(runs, folder)
    plots = plot_scores(runs, folder)
    page = write_page(runs, folder)
    out.print(console_table(runs))
    # soft_wrap: a path that is cut in two can't be copied.
    out.print("plots    ", *plots, highlight=False, soft_wrap=True)
    out.print("report   ", page, highlight=False, soft_wrap=True)
    for run in runs:
        out.print("adapter  ", run.folder.adapter_folder, highlight=False, soft_wrap=True)
