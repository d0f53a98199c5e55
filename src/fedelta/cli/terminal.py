"""Shared parts of the commands: consoles, arguments that name a configuration, output of finished runs."""

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedelta.cli.printing import print_path
from fedelta.errors import FedeltaError

out, err = Console(), Console(stderr=True)

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [key=value]…", help="File and settings; without a file, the built-in example."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last finished round, if there is one.")]
AcceptChangedData = Annotated[
    bool,
    typer.Option(
        "--accept-changed-data",
        help="Continue with rows, a tokenizer or a base model that have changed since the run began.",
    ),
]


def names(text: str) -> list[str]:
    """Split a list separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def flower_part(part: str) -> Any:
    """Import a module of `fedelta.flower`.

    Raises:
        FedeltaError: if Flower is not installed.
    """
    try:
        return importlib.import_module(f"fedelta.flower.{part}")
    except ModuleNotFoundError as error:
        raise FedeltaError(f"this command needs Flower: pip install 'fedelta[flower]' ({error})") from error


def read_settings(arguments: list[str] | None) -> tuple[dict[str, Any], str]:
    """Read and check the configuration that a command names: a file or the built-in example, then key=value settings.

    Returns:
        Keys and values, and the name of their source in error messages.

    Raises:
        FedeltaError: if a key or value is not valid. torch is not imported before, so that this takes no time.
    """
    from fedelta.runs.config_file import read_configuration
    from fedelta.runs.early_check import check_early

    arguments = list(arguments or [])
    source = Path(arguments.pop(0)) if arguments and "=" not in arguments[0] else None
    data, name = read_configuration(source, arguments)
    check_early(data, name)
    return data, name


def read_config(arguments: list[str] | None) -> Any:
    """Return the configuration that a command names."""
    data, name = read_settings(arguments)

    from fedelta.runs.config import parse_config

    return parse_config(data, name)


def finish(runs: list[Any], folder: Path) -> None:
    """Write the plot, table and page of finished runs into the folder, and print the table and some answers."""
    from fedelta.cli.examples import print_examples
    from fedelta.runs.report.page import write_page
    from fedelta.runs.report.plot import plot_scores
    from fedelta.runs.report.summary import console_table, write_table

    write_table(runs, folder)
    plots = plot_scores(runs, folder)
    page = write_page(runs, folder)
    out.print(console_table(runs))
    print_path(out, "plots", *plots)
    print_path(out, "report", page)
    for run in runs:
        print_path(out, "adapter", run.folder.adapter_folder)
    print_examples(out, runs)
