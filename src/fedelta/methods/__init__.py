"""The registry of methods: every module in this package that calls `register` is one, by import alone."""

import difflib
import importlib
import pkgutil
import warnings
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedelta.errors import FedeltaError
from fedelta.methods.method import ClientStart, ClientView, Method, Properties
from fedelta.methods.state import MethodState, Patch

_REGISTRY: dict[str, type[Method]] = {}
_ALIASES: dict[str, tuple[str, str]] = {}
M = TypeVar("M", bound=Method)


def register(cls: type[M]) -> type[M]:
    """Class decorator: make the class a frozen dataclass of its options and list it under its name and aliases."""
    method = dataclass(frozen=True, kw_only=True)(cls)
    _REGISTRY[method.name] = method
    _ALIASES.update({alias: (method.name, paper) for alias, paper in method.aliases})
    return method


def methods() -> dict[str, type[Method]]:
    """Name → class of every method, sorted."""
    return dict(sorted(_REGISTRY.items()))


def aliases() -> dict[str, tuple[str, str]]:
    """Other name → the method's name here, and the paper that has it."""
    return dict(sorted(_ALIASES.items()))


class AliasWarning(UserWarning):
    """A method was called by the name that another paper has for the same rule."""


def resolve(name: str) -> str:
    """The registry's name of a method that may be called by an alias, whatever the case of its letters; says so."""
    if name.lower() not in _ALIASES:
        return name
    method, paper = _ALIASES[name.lower()]
    warnings.warn(f"{paper} states the rule that is called {method} here", AliasWarning, stacklevel=2)
    return method


def nearest(word: str, known: list[str]) -> str:
    """«; did you mean x?» for the known word closest to a mistyped one, or nothing."""
    close = difflib.get_close_matches(word, known, 1, cutoff=0.5)
    return f"; did you mean {close[0]!r}" if close else ""


def make_method(name: str, /, **options: Any) -> Method:
    """The method of this name, or alias, with these options.

    Raises:
        FedeltaError: for an unknown name or option, with the nearest known one, or a value that an option can't have.
    """
    name = resolve(name)
    if name not in _REGISTRY:
        known = sorted(_REGISTRY)
        raise FedeltaError(
            f"unknown method {name!r}{nearest(name, known + sorted(_ALIASES))}. Known: {', '.join(known)}"
        )
    known_options = [f.name for f in fields(_REGISTRY[name])]
    for option in options:
        if option not in known_options:
            hint = nearest(option, known_options)
            raise FedeltaError(f"method {name} has no option {option!r}{hint}. Its options: {', '.join(known_options)}")
    try:
        return TypeAdapter(_REGISTRY[name]).validate_python(options)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"])
        found = first.get("input")
        message = first["msg"].removeprefix("Value error, ")
        raise FedeltaError(f"method {name}: {option}: {message[0].lower()}{message[1:]}, found {found!r}") from error


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "AliasWarning",
    "ClientStart",
    "ClientView",
    "Method",
    "MethodState",
    "Patch",
    "Properties",
    "aliases",
    "make_method",
    "methods",
    "nearest",
    "register",
    "resolve",
]
