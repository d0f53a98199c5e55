"""The command `fedelta config`."""

import sys
from typing import Annotated

import typer
from rich.markup import escape
from rich.padding import Padding

from fedelta.cli.terminal import out


def config(
    part: Annotated[
        str | None, typer.Argument(help="A section, a key or a method: training, training.steps, fedex.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON schema, for editors.")] = False,
) -> None:
    """List the keys of a configuration: type, default and meaning of each."""
    import json as json_format

    from fedelta.runs.config_keys import config_keys
    from fedelta.runs.early_check import read_schema

    if json:
        sys.stdout.write(json_format.dumps(read_schema(), indent=1, ensure_ascii=False) + "\n")
        return
    for key in config_keys(part):
        default = f" [dim]= {escape(key.default)}[/dim]" if key.default else ""
        out.print(f"[bold]{escape(key.path)}[/bold]{default}", highlight=False)
        kind = escape(key.type.replace("`", ""))
        meaning = escape(key.meaning)
        out.print(Padding(f"{kind}: {meaning}" if meaning else kind, (0, 0, 0, 4)), highlight=False)
