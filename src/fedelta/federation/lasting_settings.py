"""Which settings of a run may change in its life, and the comparison of all others."""

from collections.abc import Mapping
from typing import Any

EXTENDABLE = (
    *("rounds", "compare", "output", "name", "evaluation.target", "workers"),
    *("federation.attempts", "federation.deadline"),
)
"""Configuration keys that may change between a checkpoint and its resumption. A run can be moved, reported
differently, distributed over another number of workers, and given longer deadlines, more attempts or more rounds.
With more rounds, the former last round keeps its evaluation even if `evaluation.every` does not ask for it."""


def lasting(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The part of a configuration that can't change in the life of a run: all but `EXTENDABLE`."""
    return {
        str(key): lasting(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in config.items()
        if f"{prefix}{key}" not in EXTENDABLE
    }


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str | None:
    """Describe the first key in which two configurations differ, except for `EXTENDABLE`; None if there is none."""
    for key in sorted({*before, *now}):
        if prefix + key in EXTENDABLE:
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            inner = first_difference(old, new, f"{prefix}{key}.")
            if inner:
                return inner
        elif old != new:
            return f"{prefix}{key} was {old!r}, now {new!r}"
    return None
