"""Registry of methods. Every module in this package that calls `register` adds a method when it is imported."""

import importlib
import pkgutil
import warnings
from dataclasses import dataclass
from typing import Any, TypeVar

from fedelta.methods.method import ClientStart, ClientView, Method, Properties
from fedelta.methods.state import MethodState
from fedelta.settings import check_options

_REGISTRY: dict[str, type[Method]] = {}
_ALIASES: dict[str, tuple[str, str]] = {}
M = TypeVar("M", bound=Method)


def register(cls: type[M]) -> type[M]:
    """Register a method (class decorator): make the class a frozen dataclass and list it under its name and aliases."""
    method = dataclass(frozen=True, kw_only=True)(cls)
    _REGISTRY[method.name] = method
    _ALIASES.update({alias: (method.name, paper) for alias, paper in method.aliases})
    return method


def methods() -> dict[str, type[Method]]:
    """Return name → class of every method, sorted by name."""
    return dict(sorted(_REGISTRY.items()))


def aliases() -> dict[str, tuple[str, str]]:
    """Return alias → the method's registered name and the paper that uses the alias."""
    return dict(sorted(_ALIASES.items()))


class AliasWarning(UserWarning):
    """A method was selected by an alias, the name that another paper uses for the same rule."""


def resolve(name: str) -> str:
    """Return the registered name of a method. An alias, in any letter case, is resolved with an `AliasWarning`."""
    if name.lower() not in _ALIASES:
        return name
    method, paper = _ALIASES[name.lower()]
    warnings.warn(f"the rule of {paper} is called {method} in fedelta", AliasWarning, stacklevel=2)
    return method


def make_method(name: str, /, **options: Any) -> Method:
    """Return the method with this name or alias and these options.

    Args:
        name: registered name or alias.
        options: the method's own options and those of every method (`Method`).

    Raises:
        FedeltaError: if the name or an option is unknown, suggesting the nearest known one, or if a value is invalid.

    Example:
        >>> make_method("fedex", residual="rank=2").options
        {'residual': 'rank=2'}
    """
    return check_options(resolve(name), options, _REGISTRY, _ALIASES)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "AliasWarning",
    "ClientStart",
    "ClientView",
    "Method",
    "MethodState",
    "Properties",
    "aliases",
    "make_method",
    "methods",
    "register",
    "resolve",
]
