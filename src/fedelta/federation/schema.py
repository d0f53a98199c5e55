"""Check what is read from a run's files against the types that `records.py` declares.

A key that a later version has added is ignored. A key that an earlier version did not write may be missing, unless a
reader needs it.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any, NotRequired, get_args, get_origin, get_type_hints, is_typeddict

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from fedelta.errors import FedeltaError
from fedelta.federation.records import RoundRecord
from fedelta.settings import first_error

OPTIONAL: Mapping[Any, tuple[str, ...]] = {
    RoundRecord: ("skipped", "pruned", "version", "failed_attempts", "late", "bytes_late", "caught_up")
}
"""Keys that no reader needs."""


def check(value: Any, kind: type, name: str) -> Any:
    """Return a value that was read from a file, if it has the keys and types of a `TypedDict`.

    Args:
        value: plain data.
        kind: a `TypedDict` of `records.py`.
        name: name of the file, with the line if it has several records.

    Raises:
        FedeltaError: one line that names the file, the key, what was found and what was expected.
    """
    if not isinstance(value, dict):
        raise FedeltaError(f"{name} holds a {type(value).__name__}, expected keys and values")
    try:
        _model(kind).model_validate(value, strict=True)
    except ValidationError as error:
        key, expected, found = first_error(error)
        missing = error.errors(include_url=False)[0]["type"] == "missing"
        what = "is missing" if missing else f"is not valid: {expected[:80]}, found {_shown(found)}"
        raise FedeltaError(f"{name}: key {key[:80]!r} {what}") from error
    return value


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(value)[:40]


@cache
def _model(kind: type) -> type[BaseModel]:
    """Make a pydantic model of a `TypedDict`."""
    optional = OPTIONAL.get(kind, ())
    fields: dict[str, Any] = {}
    for key, hint in get_type_hints(kind, include_extras=True).items():
        required = get_origin(hint) is not NotRequired and key not in optional
        annotation = _without_typed_dicts(get_args(hint)[0] if get_origin(hint) is NotRequired else hint)
        fields[key] = (annotation, ...) if required else (annotation, None)
    config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())
    return create_model(kind.__name__, __config__=config, **fields)


def _without_typed_dicts(hint: Any) -> Any:
    """Replace the `TypedDict`s in a type, which pydantic does not read from `typing` before Python 3.12."""
    if is_typeddict(hint):
        return _model(hint)
    arguments = get_args(hint)
    if not arguments:
        return hint
    replaced = tuple(map(_without_typed_dicts, arguments))
    return hint if replaced == arguments else get_origin(hint)[replaced]


def digest_of(value: Mapping[str, Any]) -> str:
    """SHA-256 of plain data in a canonical form, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
