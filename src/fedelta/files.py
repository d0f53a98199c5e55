"""Atomic writes of files and folders: under a temporary name in the same folder, which is then renamed."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedelta.errors import FedeltaError

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^{}]*))?\}")
"""`${NAME}` or `${NAME:-default}`, as in a shell."""


def expand_variables(text: str) -> str:
    """Replace environment variables in the name of a file or folder.

    Settings keep the variable and are expanded where the file is opened, so that a configuration is the same on every
    machine.

    Args:
        text: `${NAME}/folder`, or `${NAME:-default}/folder` with a default for a variable that is unset or empty.

    Returns:
        A path that starts with `/`, `./` or `../`, never the name of something on a hub. Text without a variable
        is returned as it is.

    Raises:
        FedeltaError: if a variable without a default is not set, or the text is not of that form.
    """
    if "${" not in text:
        return text

    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        if found := os.environ.get(name) or default:
            return found
        raise FedeltaError(f"{text}: the environment variable {name} is not set, and there is no default")

    expanded = _VARIABLE.sub(value, text)
    if "${" in expanded:
        raise FedeltaError(f"{text}: expected ${{NAME}} or ${{NAME:-default}}")
    path = Path(expanded).expanduser()
    return str(path) if path.is_absolute() or path.parts[:1] == ("..",) else f"./{path}"


def _keep(path: Path, previous: Path) -> None:
    """Give a file a second name, which outlives its replacement. Where links do not exist, it is renamed."""
    link = previous.with_name(f".{previous.name}.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        path.replace(previous)
    else:
        link.replace(previous)
        # Nothing is renamed if both are names of one file, as after a process that was killed here.
        link.unlink(missing_ok=True)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Put the name of a file into each `OSError` of the block. The system leaves it out when a write fails."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def write_file(path: Path, content: bytes | str, *, previous: Path | None = None, make_folder: bool = True) -> None:
    """Write a file atomically: after a crash it has either its old or its new content.

    Args:
        path: the file.
        content: its new content.
        previous: name under which the old content is kept, in the same folder. None keeps nothing.
        make_folder: create the file's folder if it is missing. Without it, a missing folder is an error.

    Raises:
        OSError: naming the file.
    """
    data = content.encode() if isinstance(content, str) else content
    # The temporary name depends only on the path, so the next write overwrites the leftover of a killed process.
    temporary = path.with_name(f".{path.name}.tmp")
    with named_errors(path):
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                _keep(path, previous)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Flush renames in this folder to disk. Windows does not support this and does not need it."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder. It is renamed to `path` if the block succeeds and deleted if it raises."""
    temporary, replaced = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
    try:
        yield temporary
        with named_errors(path):
            if path.exists():
                path.replace(replaced)
            temporary.replace(path)
            _sync_folder(path.parent)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
