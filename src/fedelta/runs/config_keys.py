"""The list of configuration keys, from the committed schema: for `fedelta config` and for docs/configuration.md.

    python -m fedelta.runs.config_keys docs/configuration.md

writes the page. Run `python -m fedelta.runs.config_schema` before it if a setting has changed.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedelta.errors import FedeltaError
from fedelta.files import write_file
from fedelta.runs.early_check import METHOD_PREFIX, read_schema
from fedelta.settings import nearest, short

PAGE = """# Configuration

Every key of a configuration file, with its default. Keys of a section are written below it
(`training: {steps: 5}`), or with a dot on the command line (`training.steps=5`). `fedelta config` prints this list,
`fedelta config training` prints one section, and `fedelta config --json` prints a JSON schema. An editor checks a file
against the schema while you write it, for example with `# yaml-language-server: $schema=config.schema.json` in its
first line.

This page is made from the settings classes:
`python -m fedelta.runs.config_schema && python -m fedelta.runs.config_keys docs/configuration.md`.
"""
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_NAMES = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}


class Key(NamedTuple):
    """One key.

    Args:
        path: its dotted name.
        type: its type and limits in words.
        default: its default in YAML; empty for a section.
        meaning: what it does.
    """

    path: str
    type: str
    default: str
    meaning: str


def config_keys(part: str | None = None) -> list[Key]:
    """List the keys of the configuration.

    Args:
        part: a section, a key, or `method NAME` with the options of a method; None lists all keys.

    Raises:
        FedeltaError: if there is no such section or key.
    """
    schema = read_schema()
    definitions = schema["$defs"]
    if part is not None and METHOD_PREFIX + part.removeprefix("method.") in definitions:
        name = part.removeprefix("method.")
        return list(_keys(definitions[METHOD_PREFIX + name], definitions, "method."))
    keys = list(_keys(schema, definitions))
    if part is None:
        return keys
    found = [key for key in keys if key.path == part or key.path.startswith(f"{part}.")]
    if not found:
        raise FedeltaError(f"no key or section {short(part)}{nearest(part, list({key.path for key in keys}))}")
    return found


def _keys(section: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str = "") -> Iterator[Key]:
    for name, value in section["properties"].items():
        path = prefix + name
        sections = [] if path == "method" else _sections(value, definitions)
        words = "section" if sections and "anyOf" not in value else _type(value, definitions, path)
        if sections and value.get("default") is not None:
            default = ""
        elif name in section.get("required", ()):
            default = "required"
        else:
            default = _yaml(value.get("default", {}))
        yield Key(path, words, default, re.sub(r"\bNone\b", "null", value.get("description", "")))
        for kind, below in sections:
            for key in _keys(below, definitions, f"{path}."):
                if not kind:
                    yield key
                elif key.path != f"{path}.kind":
                    yield key._replace(meaning=f"with kind {kind}: {key.meaning}")


def _sections(value: Mapping[str, Any], definitions: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The sections that a value can be: (its kind if there are several, its schema)."""
    if "$ref" in value:
        return [("", definitions[value["$ref"].rsplit("/", 1)[-1]])]
    if "oneOf" in value:
        found = [section for one in value["oneOf"] for _, section in _sections(one, definitions)]
        return [(section["properties"]["kind"]["const"], section) for section in found]
    return [section for one in value.get("anyOf", ()) for section in _sections(one, definitions)]


def _type(value: Mapping[str, Any], definitions: Mapping[str, Any], path: str) -> str:
    if path == "method":
        return "name of a method, or keys: its name and options"
    if "enum" in value:
        return " or ".join(f"`{one}`" for one in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if "anyOf" in value:
        return " or ".join(_type(one, definitions, "") for one in value["anyOf"])
    if "$ref" in value or "oneOf" in value:
        return "section"
    if "prefixItems" in value:
        return f"list of {len(value['prefixItems'])}"
    if value.get("type") == "array":
        return f"list of {_type(value['items'], definitions, '')}"
    if value.get("type") == "object":
        return "keys and values"
    limits = ", ".join(f"{sign} {value[word]:,}" for word, sign in _LIMITS.items() if word in value)
    return f"{_NAMES[value['type']]} {limits}".strip()


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return (
            value
            if value.isidentifier() or set(value) <= set("abcdefghijklmnopqrstuvwxyz0123456789-/")
            else f'"{value}"'
        )
    return json.dumps(value)


def configuration_page() -> str:
    """Return docs/configuration.md: a table of each section, and of the options of each method."""
    schema = read_schema()
    keys = config_keys()
    parts = [PAGE, "## The run\n", _table([key for key in keys if "." not in key.path])]
    for section in [
        key for key in keys if key.path in {other.path.split(".")[0] for other in keys if "." in other.path}
    ]:
        parts += [f"## `{section.path}`\n", _table([key for key in keys if key.path.startswith(f"{section.path}.")])]
    parts += ["## Options of methods\n", "In the section `method`, next to the method's `name`. Every method has:\n"]
    methods = [name.removeprefix(METHOD_PREFIX) for name in schema["$defs"] if name.startswith(METHOD_PREFIX)]
    shared = [key for key in config_keys("fedit") if key.path != "method.name"]
    parts.append(_table(shared))
    for method in methods:
        own = [key for key in config_keys(method) if key.path != "method.name" and key not in shared]
        if own:
            parts += [f"### `{method}`\n", _table(own)]
    return "\n".join(parts)


def _table(keys: list[Key]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        default = f"`{key.default}`" if key.default else ""
        cells = (f"`{key.path}`", key.type, default, key.meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    write_file(Path(sys.argv[1]), configuration_page())
