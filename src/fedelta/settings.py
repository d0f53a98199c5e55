"""Base class of all settings, and the text of a failed validation.

Each package declares its settings beside the code that reads them; `runs/config.py` combines them. This module does not
import torch, so that a mistake in a configuration is reported at once.
"""

import difflib
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from fedelta.errors import FedeltaError, one_line

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 4
MAX_COUNT = 1_000_000_000
"""Upper limit of counts that cost time but no memory, such as rounds."""
MAX_RANK = 10_000
"""Upper limit of a LoRA rank, far above any use; it keeps a mistyped rank from filling the memory."""
MAX_INTEGER = 2**63 - 1
"""Upper limit of every whole number: numpy and torch do not take larger ones."""
MAX_MESSAGE = 150
"""Characters of a list of allowed values above which only its first ones are shown."""


class Settings(BaseModel):
    """Base class of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _check_plain_values(cls, data: Any) -> Any:
        """Refuse `rounds: true`, which pydantic would read as 1, and what numpy or the system would refuse later."""
        wrong = []
        for key, value in data.items() if isinstance(data, Mapping) else ():
            field = cls.model_fields.get(key)
            if field is not None and _is_truth_value_for_number(value, field.annotation):
                wrong.append((key, value, "expected a number"))
            elif isinstance(value, int) and abs(value) > MAX_INTEGER:
                wrong.append((key, value, "expected at most 2⁶³ − 1"))
            elif isinstance(value, str) and "\0" in value:
                wrong.append((key, value, "expected text without a null character"))
        if wrong:
            details = [
                InitErrorDetails(type=PydanticCustomError("number", text), loc=(key,), input=value)
                for key, value, text in wrong
            ]
            raise ValidationError.from_exception_data(cls.__name__, details)
        return data


def _is_truth_value_for_number(value: Any, annotation: Any) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    if not any(isinstance(one, bool) for one in values):
        return False
    types = set(_alternatives(annotation))
    return bool(types & {int, float}) and bool not in types


def _alternatives(annotation: Any) -> Iterator[Any]:
    """An annotation and everything inside it, except the values of `Literal`."""
    yield annotation
    for inner in get_args(annotation) if get_origin(annotation) is not Literal else ():
        yield from _alternatives(inner)


def short(value: object) -> str:
    """Representation of a value that was found in a file, cut to a length that fits in an error's line."""
    return _SHORT.repr(value)


def nearest(word: str, known: Sequence[str]) -> str:
    """Return "; did you mean 'x'" for the known word that is closest to a mistyped one, or an empty string."""
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(word.lower(), by_lower, 1, cutoff=0.7)
    return f"; did you mean {by_lower[close[0]]!r}" if close else ""


def first_error(error: ValidationError) -> tuple[str, str, object]:
    """Return the first error of a validation.

    Returns:
        The dotted name of the field, what was expected, and the value that was found (None if it is missing).
    """
    first = error.errors(include_url=False)[0]
    value = None if first["type"] == "missing" else first.get("input")
    return ".".join(map(str, first["loc"])), _message(first), value


def explain(error: ValidationError, settings: type[BaseModel]) -> str:
    """Describe the first error in one line. For an unknown key, suggest the nearest key of `settings`."""
    # A mistyped key explains more than the required key that is missing because of it.
    errors = sorted(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    located = [(*_locate(settings, found["loc"]), found) for found in errors]
    # Of the types that a value can have, the one that fits best has the error farthest inside it.
    top = located[0][0]
    path, sections, first = max((one for one in located if one[0][: len(top)] == top), key=lambda one: len(one[0]))
    if first["type"] == "extra_forbidden" and path[-1:] != [str(first["loc"][-1])]:
        # A key that looks like the name of an alternative.
        path = [*path, str(first["loc"][-1])]
    where = one_line(".".join(path), 100)
    others = len({tuple(other) for other, _, _ in located if other != path[: len(other)]})
    more = f" (and {others} more)" if others else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {short(where)}{_suggest(path[-1], sections, settings)}{more}"
    # A value that fits none of several types has one error for each of them.
    wanted = list(dict.fromkeys(_message(found) for other, _, found in located if other == path))
    message = " or ".join([wanted[0], *(text.removeprefix("input should be ") for text in wanted[1:])])
    value = first.get("input")
    found = "" if isinstance(value, dict) else f", found {short(value)}"
    return f"{where + ': ' if path else ''}{message}{found}{more}"


_EXPECTED = {
    **dict.fromkeys(
        ("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "input should be a whole number"
    ),
    **dict.fromkeys(("float_type", "float_parsing"), "input should be a number"),
    **dict.fromkeys(("model_type", "dict_type", "model_attributes_type"), "input should be keys and values"),
    "tuple_type": "input should be a list",
    "bool_parsing": "input should be true or false",
}
"""Type of a pydantic error → its text, where pydantic's own speaks of Python's types."""


def _message(error: Any) -> str:
    if error["type"] == "union_tag_invalid":
        found = error["ctx"]
        return f"{found['discriminator']} should be one of {found['expected_tags']}, found {short(found['tag'])}"
    if error["type"] == "union_tag_not_found":
        return "input should have the key kind"
    message = _EXPECTED.get(error["type"], error["msg"].removeprefix("Value error, "))
    if error["type"] == "literal_error" and len(message) > MAX_MESSAGE:
        known = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        message = f"input should be {', '.join(map(repr, known[:4]))} or {len(known) - 4} others"
        message += nearest(str(error["input"]), known)
    return message[:1].lower() + message[1:]


def _members(annotation: Any) -> list[Any]:
    """The types among which a value chooses: those of a union, or the annotation alone."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for one in get_args(annotation) for member in _members(one)]
    return [annotation]


def _models(members: Sequence[Any]) -> list[type[BaseModel]]:
    return [one for one in members if isinstance(one, type) and issubclass(one, BaseModel)]


def _locate(settings: type[BaseModel], location: Sequence[int | str]) -> tuple[list[str], list[type[BaseModel]]]:
    """Split the location of an error into the keys of the file, and the sections that the last key can belong to.

    Pydantic also puts the names of alternatives into a location, such as `constrained-int`; a file has no such keys.
    """
    path: list[str] = []
    members: list[Any] = [settings]
    sections = [settings]
    for part in location:
        sections = _models(members) or sections
        owner = next((one for one in _models(members) if part in one.model_fields), None)
        inside = [one for one in members if get_origin(one) is (tuple if isinstance(part, int) else dict)]
        if len(_models(members)) > 1 and (chosen := [one for one in _models(members) if _kind(one) == part]):
            members = sections = list(chosen)
            continue
        if owner is not None:
            members = _members(owner.model_fields[str(part)].annotation)
        elif inside and part != "[key]":
            members = _members([one for one in get_args(inside[0]) if one is not ...][-1])
        elif _is_alternative(part):
            continue
        path.append(str(part))
    return path, sections


def _is_alternative(part: int | str) -> bool:
    """True for pydantic's names of types, such as `constrained-int`, `literal['auto']` and `tuple[str, ...]`."""
    return str(part) in ("str", "int", "float", "bool") or "[" in str(part) or "constrained-" in str(part)


def _kind(section: type[BaseModel]) -> str | None:
    """Value of the key `kind` that selects this section among several."""
    field = section.model_fields.get("kind")
    return get_args(field.annotation)[0] if field is not None and get_origin(field.annotation) is Literal else None


def _suggest(key: str, sections: Sequence[type[BaseModel]], settings: type[BaseModel]) -> str:
    """Suggest a key of the same section, or else keys of that name in other sections."""
    near = nearest(key, [name for section in sections for name in section.model_fields])
    if near:
        return near
    elsewhere = sorted({path for path in key_paths(settings) if path.rsplit(".", 1)[-1] == key})[:3]
    return f"; did you mean {' or '.join(map(repr, elsewhere))}" if elsewhere else ""


def sections_of(settings: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A settings class and the classes of all its sections."""
    yield settings
    for field in settings.model_fields.values():
        for section in _models(_members(field.annotation)):
            yield from sections_of(section)


def key_paths(settings: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys of settings and of their sections."""
    for name, field in settings.model_fields.items():
        yield prefix + name
        for section in _models(_members(field.annotation)):
            yield from key_paths(section, f"{prefix}{name}.")


def check_options(method: str, options: Mapping[str, Any], types: Mapping[str, Any], aliases: Collection[str]) -> Any:
    """Check the options of a method, and return its dataclass with them.

    Args:
        method: name of the method.
        options: option → value.
        types: method → dataclass whose fields are its options.
        aliases: other names of methods, to suggest.

    Raises:
        FedeltaError: if the name or an option is unknown, suggesting the nearest known one, or if a value is invalid.
    """
    if method not in types:
        hint = nearest(method, [*types, *sorted(aliases)])
        raise FedeltaError(f"unknown method {short(method)}{hint}. Known: {', '.join(sorted(types))}")
    known = {field.name: field.type for field in fields(types[method])}
    for option, value in options.items():
        if option not in known:
            hint = nearest(str(option), list(known))
            raise FedeltaError(f"method {method} has no option {short(option)}{hint}. Its options: {', '.join(known)}")
        if _is_truth_value_for_number(value, known[option]):
            raise FedeltaError(f"method {method}: {option}: expected a number, found {value!r}")
    try:
        return TypeAdapter(types[method]).validate_python(dict(options))
    except ValidationError as error:
        option, expected, value = first_error(error)
        raise FedeltaError(f"method {method}: {option}: {expected}, found {short(value)}") from error


def quota(share: float, clients: int) -> int:
    """Return `share` of `clients` as a whole number, rounded to the nearest."""
    return int(share * clients + 0.5)
