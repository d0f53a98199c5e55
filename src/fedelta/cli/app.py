"""The commands and the entry point. An error is one line with exit code 2."""

import os
import re
import signal
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fedelta import __version__
from fedelta.cli.aggregate import aggregate
from fedelta.cli.arguments import Command
from fedelta.cli.configuration import config
from fedelta.cli.generate import generate
from fedelta.cli.interruption import Interruption
from fedelta.cli.predict import predict
from fedelta.cli.printing import MAX_PATH, print_error, print_path, print_text
from fedelta.cli.sites import join, keys, serve
from fedelta.cli.sweep import print_grid_report, sweep
from fedelta.cli.terminal import (
    AcceptChangedData,
    Arguments,
    Resume,
    err,
    finish,
    flower_part,
    out,
    read_config,
    read_settings,
)
from fedelta.errors import FedeltaError

app = typer.Typer(
    help="Federated fine-tuning of language models with LoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
INTERRUPTED = 130
# Typer brings its own click in some versions, so that `import click` is not certain to name these exceptions.
_UsageError: Any = typer.BadParameter.__base__
SAVED = {
    **dict.fromkeys(("run", "compare", "serve"), "finished rounds are kept; --resume continues from them"),
    "sweep": "finished rounds are kept; the same command continues from them",
    "join": "the same command takes part again",
}
"""Command → what is left when a signal ends it, and how to continue."""
_python_showwarning = warnings.showwarning


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Federated fine-tuning of language models with LoRA."""


class EngineName(StrEnum):
    """What carries messages between server and clients."""

    local = "local"
    flower = "flower"
    ray = "ray"


@app.command(cls=Command)
def run(
    arguments: Arguments = None,
    resume: Resume = False,
    accept_changed_data: AcceptChangedData = False,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time went.")] = False,
    engine: Annotated[
        EngineName, typer.Option(help="One process with workers, Flower with its nodes, or Flower simulated on Ray.")
    ] = (EngineName.local),
) -> None:
    """Train one configuration."""
    config = read_config(arguments)

    from fedelta.cli.profile_table import profile_table
    from fedelta.cli.progress import TerminalProgress
    from fedelta.runs.runner import run as run_config

    with TerminalProgress(err) as progress:
        if engine is not EngineName.local:
            if profile:
                raise FedeltaError(f"--profile works with --engine local only, found --engine {engine}")
            on_loopback = flower_part("loopback").run_on_loopback
            finished = on_loopback(config, resume, progress, engine is EngineName.ray, accept_changed_data)
        else:
            finished = run_config(
                config,
                resume=resume,
                observer=progress,
                profile=profile,
                accept_changed_data=accept_changed_data,
            )
    finish([finished], config.folder)
    if finished.profile is not None:
        out.print(profile_table(finished.profile))
        print_path(out, "profile", config.folder / "profile.json")


for command in (generate, predict, sweep, aggregate, serve, join, keys, config):
    app.command(cls=Command)(command)


@app.command(cls=Command)
def compare(
    arguments: Arguments = None,
    methods: Annotated[str | None, typer.Option(help="Names of methods, separated by commas.")] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Number of seeds; each method runs once per seed.", min=1, max=10_000)
    ] = None,
    resume: Resume = False,
    accept_changed_data: AcceptChangedData = False,
) -> None:
    """Compare several methods on the same data and initial weights, in one table and one plot."""
    from fedelta.runs.early_check import check_method_name

    named = None if methods is None else tuple(name.strip() for name in methods.split(","))
    data, source = read_settings(arguments)
    for name in named if named is not None else (data.get("compare") or {}).get("methods", ()):
        check_method_name(name)

    from fedelta.cli.progress import TerminalProgress
    from fedelta.runs.comparison import comparison_configs, comparison_folder, run_comparison
    from fedelta.runs.config import parse_config

    config = parse_config(data, source)
    chosen = config.compare.methods if named is None else named
    configs = comparison_configs(config, chosen, seeds or config.compare.seeds)
    with TerminalProgress(err, sum(one.rounds for one in configs)) as progress:
        finished = run_comparison(configs, resume, progress, accept_changed_data)
    finish(finished, comparison_folder(config))


@app.command(cls=Command)
def methods() -> None:
    """List the methods and the properties of each."""
    from fedelta.cli.methods_table import print_methods

    print_methods(out)


@app.command(cls=Command)
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, a comparison or a grid.")],
) -> None:
    """Rebuild the tables, plots and page of a run, a comparison or a grid from its files."""
    from fedelta.runs.comparison import open_runs
    from fedelta.sweep.results import FILE

    if (folder / FILE).exists():
        from fedelta.sweep.report.report import open_grid

        print_grid_report(*open_grid(folder), folder)
        return
    finish(open_runs(folder), folder)


@app.command(cls=Command)
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    adapter: Annotated[Path | None, typer.Option(help="Write one PEFT adapter here.")] = None,
    merged: Annotated[Path | None, typer.Option(help="Write the merged model and its tokenizer here.")] = None,
    rank: Annotated[int | None, typer.Option(help="Cut the adapter to this rank.", min=1)] = None,
) -> None:
    """Export the model after the last finished round of a run, with base patches folded in."""
    from fedelta.runs.export import export_run

    if adapter is None and merged is None:
        raise FedeltaError("export: pass --adapter OUT, --merged OUT, or both")
    for line in export_run(folder, adapter, merged, rank):
        print_text(out, line, limit=MAX_PATH)


@app.command(cls=Command)
def version() -> None:
    """Print the version."""
    out.print(__version__, highlight=False)


def main() -> None:
    """Run the command line; bad input is one line on standard error and exit code 2."""
    # Idle OpenMP threads spin by default, which slows down other processes; a short spin costs nothing on an idle
    # machine. The OpenMP runtime reads this variable once, when torch loads it.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = _show_warning
    with Interruption() as interruption:
        code = _run_command(interruption)
    sys.exit(code)


def _run_command(interruption: Interruption) -> int:
    """Run the command, and return its exit code. Errors and interruptions are one line each."""
    try:
        # Without standalone mode Typer returns the exit code, including that of Ctrl-C.
        code = app(standalone_mode=False) or 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        # A signal that also ends the command's processes may first appear as their error.
        code = INTERRUPTED if interruption.number is not None else _explain(error)
    if code != INTERRUPTED:
        return code
    err.print(f"stopped; {SAVED.get(sys.argv[1] if sys.argv[1:] else '', 'nothing was written')}")
    # The exit code of a program that a signal has ended.
    return 128 + (interruption.number or signal.SIGINT)


def _explain(error: Exception) -> int:
    """Print an error of the user or the system as one line, and return the exit code. Other errors are raised."""
    if isinstance(error, FedeltaError):
        return _fail(str(error))
    if isinstance(error, OSError):
        return _fail(f"{error.filename or 'standard output'}: {error.strerror or error}")
    if isinstance(error, _UsageError):
        # Typer's own usage errors, such as an unknown option or a missing argument, are one line too. Typer and click
        # both add a suggestion.
        message = re.sub(r"( Did you mean [^?]*\?)\1", r"\1", error.format_message())
        return _fail(message) if message else 2
    raise error


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Print a warning of fedelta as one line, and a warning of a library as Python does."""
    if category.__module__.startswith("fedelta"):
        print_text(err, message)
    else:
        _python_showwarning(message, category, *place, **more)


def _fail(message: str) -> int:
    print_error(err, message)
    return 2


if __name__ == "__main__":
    main()
