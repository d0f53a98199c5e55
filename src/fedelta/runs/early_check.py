"""Check of a configuration before torch is imported, which takes seconds.

The settings classes stand beside the code that reads them, and that code imports torch. Their rules are also in
`config.schema.json`, which `config_schema.py` writes. From it this module makes classes with the same names, keys,
types and limits, so that pydantic reports a mistake in the words that the classes themselves would cause. Rules about
several keys are not in the schema; `parse_config` checks those later, and everything else once more.
"""

import json
from collections.abc import Mapping
from dataclasses import field, make_dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast

from pydantic import ConfigDict, Field, ValidationError, create_model

from fedelta.errors import FedeltaError
from fedelta.runs.config_file import method_settings, spell_task
from fedelta.settings import Settings, check_options, explain

SCHEMA_FILE = "config.schema.json"
METHODS = Path(__file__).parents[1] / "methods"
METHOD_PREFIX = "method "
"""Prefix of the definitions with the options of a method."""
_LIMITS = {
    "minimum": "ge",
    "maximum": "le",
    "exclusiveMinimum": "gt",
    "exclusiveMaximum": "lt",
    "pattern": "pattern",
    "minLength": "min_length",
    "maxLength": "max_length",
    "minItems": "min_length",
    "maxItems": "max_length",
}
"""Keyword of JSON schema → argument of pydantic's `Field`."""
# Type checkers don't follow types that are made from data.
_UNION, _LITERAL, _TUPLE, _DICT, _create_model = (cast(Any, one) for one in (Union, Literal, tuple, dict, create_model))
_TYPES: dict[str, Any] = {"string": str, "integer": int, "number": float, "boolean": bool, "null": None}


@cache
def read_schema() -> dict[str, Any]:
    """Read the committed schema of the configuration."""
    return json.loads((files("fedelta.runs") / SCHEMA_FILE).read_text(encoding="utf-8"))


def check_early(data: Mapping[str, Any], name: str = "configuration") -> None:
    """Raise if plain data have an unknown key, a value of a wrong type or outside its limits, or a wrong method option.

    Args:
        data: keys and values, as read from YAML.
        name: name of the source in error messages.

    Raises:
        FedeltaError: the same line as `parse_config` raises.
    """
    settings = _classes()[0]
    spelled = dict(data)
    if "task" in spelled:
        task = spell_task(spelled["task"])
        spelled["task"] = {"kind": "classification", **task} if isinstance(task, Mapping) else task
    if "method" in spelled:
        spelled["method"] = method_settings(spelled["method"])
    try:
        checked: Any = settings.model_validate(spelled)
    except ValidationError as error:
        raise FedeltaError(f"{name}: {explain(error, settings)}") from error
    check_method_name(checked.method.name, checked.method.options)


def check_method_name(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Raise if there is no method with this name or alias and these options.

    Raises:
        FedeltaError: the same line as `make_method` raises.
    """
    _, types, aliases = _classes()
    method = aliases.get(name.lower(), name)
    # A method that is being written is not in the schema yet.
    if method not in types and any(f'"{name}"' in file.read_text() for file in METHODS.glob("*.py")):
        return
    check_options(method, options or {}, types, aliases)


@cache
def _classes() -> tuple[type[Settings], dict[str, Any], dict[str, str]]:
    """Classes of the configuration and of each method's options, and alias → method."""
    schema = read_schema()
    make = _Maker(schema["$defs"])
    task, method = schema["properties"]["task"], schema["properties"]["method"]
    make.made["MethodSettings"] = create_model(
        "MethodSettings", __base__=Settings, name=(str, method["default"]), options=(dict[str, Any], {})
    )
    properties = schema["properties"] | {
        "task": {**task["anyOf"][1], "default": task["default"]},
        "method": {"$ref": "MethodSettings", "default": make.made["MethodSettings"]()},
    }
    config = make.section("Config", {**schema, "properties": properties})
    types: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    for definition, options in schema["$defs"].items():
        if definition.startswith(METHOD_PREFIX):
            name = definition.removeprefix(METHOD_PREFIX)
            aliases |= dict.fromkeys(options["properties"]["name"]["enum"][1:], name)
            own = [
                (option, make.type_of(value), field(default=value.get("default")))
                for option, value in options["properties"].items()
                if option != "name"
            ]
            finite = {"__pydantic_config__": ConfigDict(allow_inf_nan=False)}
            types[name] = make_dataclass(definition, own, kw_only=True, namespace=finite)
    return config, types, aliases


class _Maker:
    """Makes types from the definitions of a JSON schema.

    Args:
        definitions: name → schema.

    Attributes:
        made: name → class that has been made.
    """

    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self.definitions = definitions
        self.made: dict[str, Any] = {}

    def section(self, name: str, schema: Mapping[str, Any]) -> Any:
        """Make a settings class from a schema with properties."""
        required = schema.get("required", ())
        keys = {
            key: (self.type_of(value), ... if key in required else value.get("default"))
            for key, value in schema["properties"].items()
        }
        return _create_model(name, __base__=Settings, **keys)

    def type_of(self, schema: Mapping[str, Any]) -> Any:
        """Make the type of a value."""
        if "$ref" in schema:
            name = schema["$ref"].rsplit("/", 1)[-1]
            if name not in self.made:
                self.made[name] = self.section(name, self.definitions[name])
            return self.made[name]
        if "oneOf" in schema:
            kinds = _UNION[tuple(self.type_of(one) for one in schema["oneOf"])]
            return Annotated[kinds, Field(discriminator=schema["discriminator"]["propertyName"])]
        if "anyOf" in schema:
            return _UNION[tuple(self.type_of(one) for one in schema["anyOf"])]
        if "enum" in schema or "const" in schema:
            return _LITERAL[tuple(schema.get("enum") or [schema["const"]])]
        kind = self._container(schema) or _TYPES.get(schema.get("type", ""), Any)
        limits = {argument: schema[word] for word, argument in _LIMITS.items() if word in schema}
        return Annotated[kind, Field(**limits)] if limits and "prefixItems" not in schema else kind

    def _container(self, schema: Mapping[str, Any]) -> Any:
        if "prefixItems" in schema:
            return _TUPLE[tuple(self.type_of(one) for one in schema["prefixItems"])]
        if schema.get("type") == "array":
            return _TUPLE[self.type_of(schema["items"]), ...]
        if schema.get("type") == "object":
            keys = self.type_of(schema["propertyNames"]) if "propertyNames" in schema else str
            values = schema.get("additionalProperties", True)
            return _DICT[keys, self.type_of(values) if isinstance(values, Mapping) else Any]
        return None
