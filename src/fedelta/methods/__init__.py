"""The registry of methods: every module in this package that calls `register` is one, by import alone."""

import difflib
import importlib
import pkgutil
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from fedelta.errors import FedeltaError
from fedelta.methods.method import Method, MethodState, Tailored

_REGISTRY: dict[str, type[Method]] = {}
M = TypeVar("M", bound=Method)


def register(cls: type[M]) -> type[M]:
    """Class decorator: make the class a frozen dataclass of its options and list it under its name."""
    method = dataclass(frozen=True)(cls)
    _REGISTRY[method.name] = method
    return method


def methods() -> dict[str, type[Method]]:
    """Name → class of every method, sorted."""
    return dict(sorted(_REGISTRY.items()))


def nearest(word: str, known: list[str]) -> str:
    """«; did you mean x?» for the known word closest to a mistyped one, or nothing."""
    close = difflib.get_close_matches(word, known, 1, cutoff=0.5)
    return f"; did you mean {close[0]!r}" if close else ""


def make_method(name: str, **options: Any) -> Method:
    """The method of this name with these options.

    Raises:
        FedeltaError: for an unknown name or option, with the nearest known one.
    """
    if name not in _REGISTRY:
        known = sorted(_REGISTRY)
        raise FedeltaError(f"unknown method {name!r}{nearest(name, known)}. Known: {', '.join(known)}")
    known_options = [f.name for f in fields(_REGISTRY[name])]  # type: ignore[arg-type]
    for option in options:
        if option not in known_options:
            listed = ", ".join(known_options) or "none"
            hint = nearest(option, known_options)
            raise FedeltaError(f"method {name} has no option {option!r}{hint}. Its options: {listed}")
    return _REGISTRY[name](**options)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Method", "MethodState", "Tailored", "make_method", "methods", "nearest", "register"]
