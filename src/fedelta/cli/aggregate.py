"""The command `fedelta aggregate`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedelta.cli.printing import MAX_PATH, print_text
from fedelta.cli.terminal import err, out
from fedelta.errors import FedeltaError

MAX_NOTES = 10
"""Notes that are printed; --json has all."""


def aggregate(
    folders: Annotated[
        list[str], typer.Argument(metavar="DIR…", help="PEFT adapter folders of one base model, or names on the Hub.")
    ],
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
    as_sum: Annotated[
        bool, typer.Option("--sum", help="Add up: weights as they are, which may be negative. Not a mean.")
    ] = False,
    rank: Annotated[int | None, typer.Option(help="Cut the result to this rank.", min=1)] = None,
    single: Annotated[bool, typer.Option("--single", help="Fold a base patch into the adapter.")] = False,
    base: Annotated[
        str | None, typer.Option(help="Name of the base model, if the folders call one model by several names.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse missing modules, repaired names and other notes.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Aggregate PEFT adapter folders offline: their exact weighted mean or sum, or one server step of a method."""
    from fedelta.aggregate.step import aggregate_folders
    from fedelta.cli.aggregation_table import aggregation_json, aggregation_lines, aggregation_table
    from fedelta.cli.bars import progress_bar

    chosen = None if method is None else _method(method, option or [])
    if option and chosen is None:
        raise FedeltaError("--option needs a method: add --method NAME")
    with progress_bar(err, "modules") as progress:
        done = aggregate_folders(
            folders,
            output,
            method=chosen,
            weights=None if weights is None else _numbers(weights),
            as_sum=as_sum,
            rank=rank,
            single=single,
            base=base,
            strict=strict,
            progress=progress,
        )
    if json:
        sys.stdout.write(aggregation_json(done) + "\n")
        return
    out.print(aggregation_table(done))
    for line in aggregation_lines(done):
        print_text(out, line, limit=MAX_PATH)
    more = [f"{len(done.notes) - MAX_NOTES} more notes: --json has them"] if len(done.notes) > MAX_NOTES else []
    for note in [*done.notes[:MAX_NOTES], *more]:
        print_text(err, note, "note:")


def _method(name: str, options: list[str]) -> Any:
    from fedelta.methods import make_method
    from fedelta.reading import parse_yaml

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
