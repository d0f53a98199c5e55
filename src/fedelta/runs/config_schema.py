"""The JSON schema of the configuration, made from the settings classes and the methods.

    python -m fedelta.runs.config_schema

writes `runs/config.schema.json`. It is committed, because `early_check.py` and `fedelta config` read it without
importing the classes, which takes seconds, and because editors use it to check a file while it is written.
"""

import inspect
import json
import re
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fedelta.files import write_file
from fedelta.methods import aliases, methods
from fedelta.runs.config import Config
from fedelta.runs.early_check import METHOD_PREFIX, SCHEMA_FILE
from fedelta.settings import sections_of

_ENTRY = re.compile(r"^(\w+(?:, \w+)*): (.*)$")


def config_schema() -> dict[str, Any]:
    """Return the schema: sections, types, limits, defaults, and the meaning of each key from its docstring."""
    schema = Config.model_json_schema()
    classes = {one.__name__: one for one in sections_of(Config)}
    sections = {"Config": schema, **schema["$defs"]}
    for name, section in sections.items():
        _describe(section, classes[name])
    schema["title"] = "Configuration of fedelta"
    definitions, properties = schema["$defs"], schema["properties"]
    del definitions["MethodSettings"]
    kinds = properties["task"].pop("oneOf")
    by_kind = {"oneOf": kinds, "discriminator": properties["task"].pop("discriminator")}
    properties["task"]["anyOf"] = [{"type": "string", "enum": sorted(by_kind["discriminator"]["mapping"])}, by_kind]
    for name in by_kind["discriminator"]["mapping"].values():
        section = definitions[name.rsplit("/", 1)[-1]]
        if section["properties"]["kind"]["const"] != "classification":
            section["required"] = ["kind"]
    other_names: dict[str, list[str]] = {}
    for alias, (name, _) in aliases().items():
        other_names.setdefault(name, []).append(alias)
    # A program may register methods of its own, which are not part of the package.
    own = {name: method for name, method in methods().items() if method.__module__.startswith("fedelta.methods.")}
    for name, method in own.items():
        definitions[METHOD_PREFIX + name] = _method(name, method, other_names.get(name, []))
    names = [*own, *(alias for name in own for alias in other_names.get(name, []))]
    options = [{"$ref": f"#/$defs/{METHOD_PREFIX}{name}"} for name in own]
    properties["method"].pop("$ref", None)
    properties["method"] |= {"anyOf": [{"type": "string", "enum": names}, *options], "default": Config().method.name}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_without_titles(schema)}


def _describe(section: dict[str, Any], settings: type[Any]) -> None:
    """Replace the docstring of a section by its first paragraph, and give each key its own text."""
    entries = read_entries(settings)
    section["description"] = inspect.cleandoc(settings.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    for name, key in section["properties"].items():
        text = entries.get(name) or _elsewhere(name, entries)
        if text:
            key["description"] = text


def read_entries(documented: type[Any]) -> dict[str, str]:
    """Return name → text of the `Args:` in the docstrings of a class and its bases."""
    entries: dict[str, str] = {}
    for one in reversed(documented.__mro__):
        _, _, block = inspect.cleandoc(one.__dict__.get("__doc__") or "").partition("Args:\n")
        names: list[str] = []
        for line in block.split("\n\n")[0].splitlines():
            entry = _ENTRY.match(line.removeprefix("    "))
            if entry:
                names = entry[1].split(", ")
                entries.update(dict.fromkeys(names, entry[2].strip()))
            else:
                entries.update({name: f"{entries[name]} {line.strip()}" for name in names})
    return entries


def _elsewhere(name: str, entries: dict[str, str]) -> str | None:
    """Point to the key whose text explains this one, such as `kind`, which lists what each kind needs."""
    return next((f"see `{other}`" for other, text in entries.items() if re.search(rf"[`(]{name}\b", text)), None)


def _method(name: str, method: type[Any], other_names: list[str]) -> dict[str, Any]:
    options = TypeAdapter(method).json_schema()
    entries = read_entries(method)
    for option, key in options["properties"].items():
        key["description"] = entries.get(option, "")
    named = {"type": "string", "enum": [name, *other_names], "description": "name of the method"}
    return {
        "type": "object",
        "description": f"{method.summary} ({method.paper})",
        "properties": {"name": named, **options["properties"]},
        "required": ["name"],
        "additionalProperties": False,
    }


def _without_titles(schema: Any) -> Any:
    """Drop pydantic's titles, which repeat the names of the keys."""
    if isinstance(schema, list):
        return [_without_titles(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    title = schema.get("title")
    own = isinstance(title, str) and not title.startswith("Configuration")
    return {key: _without_titles(value) for key, value in schema.items() if not (key == "title" and own)}


def schema_text() -> str:
    """Return the content of the committed file."""
    return json.dumps(config_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    write_file(Path(__file__).with_name(SCHEMA_FILE), schema_text())
