"""Shared options of the commands that use a result: `generate` and `predict`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedelta.cli.printing import MAX_PATH, print_text
from fedelta.cli.terminal import err


class DeviceName(StrEnum):
    """Device that runs the model."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DtypeName(StrEnum):
    """Type of the base model's weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


Place = Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="Folder of a finished run, or an adapter folder.")]
Client = Annotated[
    str | None, typer.Option(help="Client whose adapter is used, if the method has no global model.", metavar="NAME")
]
Base = Annotated[str | None, typer.Option(help="The base model, if it is not where the result says.", metavar="FOLDER")]
Device = Annotated[DeviceName, typer.Option(help="Device that runs the model.")]
Dtype = Annotated[DtypeName | None, typer.Option(help="Type of the base model; default: that of the run.")]


def say_loading(base: str | None) -> None:
    """Say on a terminal which base model is loaded, which may take minutes."""
    if base is not None and err.is_terminal:
        print_text(err, f"loading {base}", limit=MAX_PATH)


def dtype_name(dtype: DtypeName | None) -> str | None:
    """The type as the library names it."""
    return None if dtype is None else str(dtype)
