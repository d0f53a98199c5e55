"""Bounded reading of JSON and YAML: size, nesting and aliases have limits, and each error names the file."""

import json
import re
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


def parse_json(text: str | bytes, name: str, finite: bool = True) -> Any:
    """Parse JSON.

    Args:
        text: the text, or its bytes in UTF-8.
        name: name of the source in errors.
        finite: refuse NaN and Infinity, which Python's own reader accepts, although they are not JSON.

    Raises:
        FedeltaError: if the text is nested too deeply or not JSON.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant if finite else None)
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


_DECIMAL = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")


class _Loader(yaml.SafeLoader):
    """YAML without the surprises of its first edition: a key counts once, 010 is not 8, and 1:30 is not 90."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            # Keys of a merge (<<) may be set again, which is how some of them are changed.
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                name = (key.tag, key.value)
                if name in first:
                    raise ValueError(f"key {key.value[:60]!r} is set twice, in lines {first[name]} and {line}")
                first[name] = line
        return node


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, _DECIMAL if tag.endswith(":int") else pattern) for tag, pattern in resolvers]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


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
    """Parse one YAML document, in which a key may be set once.

    Args:
        text: the text, or its bytes in UTF-8.
        name: name of the source in errors.

    Raises:
        FedeltaError: if the text is not YAML, sets a key twice, is nested too deeply, or has more than `MAX_NODES`
            values when its aliases are written out. Without that limit, a file of some hundred bytes can stand for
            more than memory holds.
    """
    try:
        loader = _Loader(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
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
        problem = ": ".join(part for part in (error.context, error.problem) if part)
        raise FedeltaError(f"{name}: not valid YAML: {problem[:120]}{place}") from error
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
