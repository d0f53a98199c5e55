"""Files: atomic writes, and bounded reading of JSON and YAML.

A write goes to a temporary name in the same folder and is then renamed. Reading never trusts a file: its size, its
nesting and its aliases have limits, and each error names the file.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from fedelta.errors import FedeltaError

MAX_BYTES = 10_000_000
"""Default limit for a file of settings."""
MAX_NODES = 1_000_000
"""Limit for the number of values in a YAML document, counted with all aliases written out."""
MAX_DEPTH = 50
"""Limit for the nesting of a YAML document."""

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


def read_bytes(path: Path, max_bytes: int, what: str = "") -> bytes:
    """Read a file of limited size.

    Args:
        path: the file.
        max_bytes: its largest size.
        what: what the file is, before its name in errors.

    Raises:
        FedeltaError: naming the file, if it can't be read or is larger than `max_bytes`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise FedeltaError(f"{what} {path}: {error.strerror or error}".lstrip()) from error
    if len(content) > max_bytes:
        raise FedeltaError(f"{what} {path}".lstrip() + f" has more than {max_bytes:,} bytes, expected a smaller file")
    return content


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        FedeltaError: naming the file, if it is missing, too large, nested too deeply, or not JSON.
    """
    return parse_json(read_bytes(path, max_bytes), str(path))


def parse_json(text: str | bytes, name: str) -> Any:
    """Parse JSON. NaN and Infinity, which Python's own reader accepts, are not JSON.

    Args:
        text: the text, or its bytes in UTF-8.
        name: name of the source in errors.

    Raises:
        FedeltaError: if the text is nested too deeply or not JSON.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise FedeltaError(f"{name} is not valid JSON: nested too deeply") from error
    except UnicodeDecodeError as error:
        raise FedeltaError(f"{name} is not valid JSON: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise FedeltaError(f"{name} is not valid JSON: {error.msg.lower()} at {place}") from error
    except ValueError as error:
        raise FedeltaError(f"{name} is not valid JSON: {str(error).partition(';')[0]}") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, expected a finite number")


def read_yaml(path: Path, what: str = "", max_bytes: int = MAX_BYTES) -> Any:
    """Read a YAML file.

    Args:
        path: the file.
        what: what the file is, before its name in errors.
        max_bytes: its largest size.

    Raises:
        FedeltaError: naming the file, if it is missing, too large, nested too deeply, or not YAML in UTF-8.
    """
    return parse_yaml(read_bytes(path, max_bytes, what), f"{what} {path}".lstrip())


def parse_yaml(text: str | bytes, name: str) -> Any:
    """Parse one YAML document.

    Args:
        text: the text, or its bytes in UTF-8.
        name: name of the source in errors.

    Raises:
        FedeltaError: if the text is not YAML, is nested too deeply, or has more than `MAX_NODES` values when its
            aliases are written out. Without that limit, a file of some hundred bytes can stand for more than memory
            holds.
    """
    try:
        loader = yaml.SafeLoader(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError as error:
        raise FedeltaError(f"{name}: nested too deeply") from error
    except UnicodeDecodeError as error:
        raise FedeltaError(f"{name}: not a text file in UTF-8 (byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or error.context or "not valid YAML"
        raise FedeltaError(f"{name}: {problem[:120]}{place}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise FedeltaError(f"{name}: {' '.join(str(error).partition(';')[0].split())[:160]}") from error


def _check_size(root: yaml.Node) -> None:
    """Raise if a document has too many values with its aliases written out, or contains itself."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise ValueError("a value that contains itself")
        if len(open_nodes) == MAX_DEPTH:
            raise RecursionError
        if id(node) not in sizes:
            open_nodes.add(id(node))
            below = node.value if isinstance(node, yaml.CollectionNode) else []
            children = [part for item in below for part in (item if isinstance(item, tuple) else (item,))]
            sizes[id(node)] = total = 1 + sum(map(size, children))
            open_nodes.remove(id(node))
            if total > MAX_NODES:
                raise ValueError(f"more than {MAX_NODES:,} values with aliases written out")
        return sizes[id(node)]

    size(root)


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
