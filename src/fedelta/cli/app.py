"""The commands and the entry point. An error is one line with exit code 2."""

import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.markup import escape

from fedelta import __version__
from fedelta.cli.sites import join, keys, serve
from fedelta.cli.sweep import print_grid_report, sweep
from fedelta.cli.terminal import AcceptChangedData, Arguments, Resume, err, finish, flower_part, out, read_config
from fedelta.errors import FedeltaError

app = typer.Typer(
    help="Federated fine-tuning of language models with LoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
INTERRUPTED = 130
_python_showwarning = warnings.showwarning


class EngineName(StrEnum):
    """What carries messages between server and clients."""

    local = "local"
    flower = "flower"
    ray = "ray"


@app.command()
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
    from fedelta.cli.profile_table import profile_table
    from fedelta.cli.progress import TerminalProgress
    from fedelta.runs.runner import run as run_config

    config = read_config(arguments)
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
        out.print("profile  ", config.folder / "profile.json", highlight=False, soft_wrap=True)


for command in (sweep, serve, join, keys):
    app.command()(command)


@app.command()
def compare(
    arguments: Arguments = None,
    methods: Annotated[str | None, typer.Option(help="Names of methods, separated by commas.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds; each method runs once per seed.", min=1)] = None,
    resume: Resume = False,
    accept_changed_data: AcceptChangedData = False,
) -> None:
    """Compare several methods on the same data and initial weights, in one table and one plot."""
    from fedelta.cli.progress import TerminalProgress
    from fedelta.runs.comparison import comparison_configs, comparison_folder, run_comparison

    config = read_config(arguments)
    chosen = config.compare.methods if methods is None else tuple(name.strip() for name in methods.split(","))
    configs = comparison_configs(config, chosen, seeds or config.compare.seeds)
    with TerminalProgress(err, sum(one.rounds for one in configs)) as progress:
        finished = run_comparison(configs, resume, progress, accept_changed_data)
    finish(finished, comparison_folder(config))


@app.command()
def methods() -> None:
    """List the methods and the properties of each."""
    from fedelta.cli.methods_table import print_methods

    print_methods(out)


@app.command()
def aggregate(
    folders: Annotated[list[str], typer.Argument(metavar="DIR…", help="PEFT adapter folders of one base model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    method: Annotated[
        str | None, typer.Option(help="Method whose server step is applied; default: the exact mean.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the method, as key=value; may be repeated.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Weight of each folder, separated by commas; default: equal weights.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Cut the result to this rank.", min=1)] = None,
    single: Annotated[bool, typer.Option("--single", help="Fold a base patch into the adapter.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Aggregate PEFT adapter folders offline: their exact weighted mean, or one server step of a method."""
    from fedelta.aggregate.step import aggregate_folders
    from fedelta.cli.aggregation_table import aggregation_json, aggregation_lines, aggregation_table
    from fedelta.cli.progress import progress_bar

    chosen = None if method is None else _method(method, option or [])
    if option and chosen is None:
        raise FedeltaError("--option needs a method: add --method NAME")
    with progress_bar(err, "modules") as progress:
        done = aggregate_folders(
            folders,
            output,
            method=chosen,
            weights=None if weights is None else _numbers(weights),
            rank=rank,
            single=single,
            progress=progress,
        )
    if json:
        sys.stdout.write(aggregation_json(done) + "\n")
        return
    out.print(aggregation_table(done))
    for line in aggregation_lines(done):
        out.print(escape(line), highlight=False, soft_wrap=True)


def _method(name: str, options: list[str]) -> Any:
    from fedelta.files import parse_yaml
    from fedelta.methods import make_method

    values = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise FedeltaError(f"--option {option!r}: expected key=value, such as residual=rank=8")
        values[key] = parse_yaml(value, f"--option {option[:60]!r}")
    return make_method(name, **values)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise FedeltaError(f"--weights {text!r}: expected numbers separated by commas") from error


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="RUN")]) -> None:
    """Rebuild the tables, plots and page of a run, a comparison or a grid from its files."""
    from fedelta.runs.comparison import open_runs
    from fedelta.sweep.results import FILE

    if (folder / FILE).exists():
        from fedelta.sweep.report.report import open_grid

        print_grid_report(*open_grid(folder), folder)
        return
    finish(open_runs(folder), folder)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN")],
    adapter: Annotated[Path | None, typer.Option(help="Write one PEFT adapter here.")] = None,
    merged: Annotated[Path | None, typer.Option(help="Write the merged model and its tokenizer here.")] = None,
    rank: Annotated[int | None, typer.Option(help="Cut the adapter to this rank.", min=1)] = None,
) -> None:
    """Export the model after the last finished round of a run, with base patches folded in."""
    from fedelta.runs.export import export_run

    if adapter is None and merged is None:
        raise FedeltaError("export: pass --adapter OUT, --merged OUT, or both")
    for line in export_run(folder, adapter, merged, rank):
        out.print(escape(line), highlight=False, soft_wrap=True)


@app.command()
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
    try:
        # Without standalone mode Typer returns the exit code, including that of Ctrl-C.
        code = app(standalone_mode=False) or 0
    except FedeltaError as error:
        code = _fail(str(error))
    except OSError as error:
        code = _fail(f"{error.filename or 'standard output'}: {error.strerror or error}")
    except click.ClickException as error:
        # Typer's own usage errors, such as an unknown option or a missing argument, are one line too.
        code = _fail(error.format_message()) if error.format_message() else 2
    if code == INTERRUPTED:
        trains = sys.argv[1:2] in (["run"], ["compare"], ["serve"])
        saved = "finished rounds are kept; --resume continues from them" if trains else "nothing was written"
        if sys.argv[1:2] == ["sweep"]:
            saved = "finished rounds are kept; the same command continues from them"
        err.print(f"stopped; {saved}")
    sys.exit(code)


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Print a warning of fedelta as one line, and a warning of a library as Python does."""
    if category.__module__.startswith("fedelta"):
        err.print(escape(str(message)), highlight=False, soft_wrap=True)
    else:
        _python_showwarning(message, category, *place, **more)


def _fail(message: str) -> int:
    err.print(f"[red]error:[/red] {escape(' '.join(message.split()))}", highlight=False, soft_wrap=True)
    return 2


if __name__ == "__main__":
    main()
