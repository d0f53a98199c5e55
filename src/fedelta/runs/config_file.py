"""Reading of a configuration file and of key=value settings, as plain data.

This module does not import torch: `early_check.py` reports a mistake before anything slow is loaded.
"""

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedelta.errors import FedeltaError
from fedelta.reading import parse_yaml, read_yaml
from fedelta.settings import nearest, short

DEMO = "demo.yaml"


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
    if source is None:
        data = parse_yaml((files("fedelta.runs") / DEMO).read_bytes(), name)
    else:
        if not source.exists():
            raise FedeltaError(f"{what} {name}: No such file or directory{_suggest_file(source)}")
        data = read_yaml(source, what)
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise FedeltaError(f"{what} {name} holds a {type(data).__name__}, expected keys and values")
    for key in data:
        if not isinstance(key, str):
            raise FedeltaError(f"{what} {name}: key {short(key)} is a {type(key).__name__}, expected a name")
    return data, name


def _suggest_file(source: Path) -> str:
    """Suggest the YAML file in the same folder whose name is closest to a missing one."""
    try:
        found = [path.name for path in source.parent.iterdir()]
    except OSError:
        return ""
    return nearest(source.name, [name for name in found if name.endswith((".yaml", ".yml"))])


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
    return key, parse_yaml(value, f"override {short(override)}")


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
