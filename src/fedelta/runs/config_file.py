"""Reading of a configuration file and of key=value settings, as plain data.

This module does not import torch: `early_check.py` reports a mistake before anything slow is loaded.
"""

import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from fedelta.errors import FedeltaError
from fedelta.settings import nearest, short

DEMO = "demo.yaml"
MAX_BYTES = 10_000_000
MAX_VALUES = 1_000_000
MAX_DEPTH = 50
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
                    raise FedeltaError(f"key {short(key.value)} is set twice, in lines {first[name]} and {line}")
                first[name] = line
        return node


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, _DECIMAL if tag.endswith(":int") else pattern) for tag, pattern in resolvers]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str) -> Any:
    """Read a YAML document as plain data.

    Raises:
        FedeltaError: if it is not valid YAML, sets a key twice, or holds too much.
    """
    try:
        data = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        context = f"{error.context}: " if error.context else ""
        raise FedeltaError(f"not valid YAML{where}: {' '.join(f'{context}{error.problem}'.split())[:160]}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise FedeltaError(f"not valid YAML: {' '.join(str(error).split())[:160]}") from error
    except RecursionError as error:
        raise FedeltaError(f"values are nested too deeply, expected at most {MAX_DEPTH} levels") from error
    _check_size(data)
    return data


def _check_size(data: Any) -> None:
    """Raise if references (`*name`) make a small file describe a huge or endless value."""
    level, count = [data], 0
    for _ in range(MAX_DEPTH):
        count += len(level)
        if count > MAX_VALUES:
            raise FedeltaError(f"more than {MAX_VALUES:,} values")
        deeper: list[Any] = []
        for value in level:
            deeper += value.values() if isinstance(value, dict) else value if isinstance(value, list | set) else ()
            if len(deeper) > MAX_VALUES:
                raise FedeltaError(f"more than {MAX_VALUES:,} values")
        level = deeper
        if not level:
            return
    raise FedeltaError(f"values are nested too deeply, expected at most {MAX_DEPTH} levels")


def read_file(source: Path | None, what: str = "configuration") -> tuple[dict[str, Any], str]:
    """Read a YAML file with keys and values, or the built-in example.

    Args:
        source: path of the file. None reads the built-in example.
        what: what the file holds, for error messages.

    Returns:
        Its keys and values, and the name of the source in error messages.

    Raises:
        FedeltaError: if the file is missing, or is not a YAML file of keys and values.
    """
    name = str(source) if source else "the built-in example"
    try:
        with source.open("rb") if source else (files("fedelta.runs") / DEMO).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise FedeltaError(f"{what} {name}: {error.strerror}{_suggest_file(source)}") from error
    except UnicodeDecodeError as error:
        raise FedeltaError(f"{what} {name}: not a text file") from error
    except ValueError as error:
        raise FedeltaError(f"{what} {name!r}: {error}") from error
    if len(content) > MAX_BYTES:
        raise FedeltaError(f"{what} {name}: more than {MAX_BYTES // 10**6} MB, expected a YAML file of settings")
    try:
        data = read_yaml(text)
    except FedeltaError as error:
        raise FedeltaError(f"{what} {name}: {error}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise FedeltaError(f"{what} {name} holds a {type(data).__name__}, expected keys and values")
    for key in data:
        if not isinstance(key, str):
            raise FedeltaError(f"{what} {name}: key {short(key)} is a {type(key).__name__}, expected a name")
    return data, name


def _suggest_file(source: Path | None) -> str:
    """Suggest the YAML file in the same folder whose name is closest to a missing one."""
    try:
        found = [] if source is None or source.exists() else [p.name for p in source.parent.iterdir()]
    except OSError:
        return ""
    return nearest(source.name, [name for name in found if name.endswith((".yaml", ".yml"))]) if source else ""


def read_configuration(source: Path | None, overrides: Iterable[str] = ()) -> tuple[dict[str, Any], str]:
    """Read a file as `read_file` does, and apply `key=value` settings such as `training.steps=5`.

    Raises:
        FedeltaError: if the file or a setting is not valid.
    """
    data, name = read_file(source)
    for override in overrides:
        set_key(data, *read_override(override))
    return data, name


def read_override(override: str) -> tuple[str, Any]:
    """Split `training.steps=5` into a key and a value. The value is read as YAML.

    Raises:
        FedeltaError: if there is no key or `=`, or the value is not valid YAML.
    """
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise FedeltaError(f"override {short(override)}: expected key=value, such as training.steps=5")
    try:
        return key, read_yaml(value)
    except FedeltaError as error:
        raise FedeltaError(f"override {short(override)}: {error}") from error


def set_key(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a key such as `training.steps` in plain data, in place. Other keys of the section stay as they are.

    Raises:
        FedeltaError: if the key leads through a value that is not a section.
    """
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        section = data.get(parent)
        if depth == 0:
            section = {"method": spell_method, "task": spell_task}.get(parent, lambda value: value)(section)
        if section is not None and not isinstance(section, Mapping):
            name = ".".join(parents[: depth + 1])
            raise FedeltaError(f"{key}: {name} is {short(section)}, expected a section with keys")
        data[parent] = data = dict(section or {})
    data[last] = value


def spell_method(value: Any) -> Any:
    """Return `method: fedex` as `method: {name: fedex}`."""
    return {"name": value} if isinstance(value, str) else value


def spell_task(value: Any) -> Any:
    """Return `task: regression` as `task: {kind: regression}`."""
    return {"kind": value} if isinstance(value, str) else value


def method_settings(value: Any) -> Any:
    """Return a method in the form of `MethodSettings`: a file has the options next to the name."""
    value = spell_method(value)
    if not isinstance(value, Mapping) or "options" in value:
        return value
    options = {key: option for key, option in value.items() if key != "name"}
    return {**({"name": value["name"]} if "name" in value else {}), "options": options}
