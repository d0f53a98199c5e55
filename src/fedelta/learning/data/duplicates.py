"""Rows that occur more than once: within a split, or in the training rows and in a split that is scored."""

from collections.abc import Mapping
from typing import Any

from fedelta.learning.data.cells import counts
from fedelta.learning.data.settings import Columns
from fedelta.learning.data.table import Table, json_text, say

PRECEDENCE = ("test", "validation", "train")
"""A row that several splits have stays in the first of these, so that a test split never shrinks to what is easy."""


def without_duplicates(tables: Mapping[str, Table], columns: Columns) -> dict[str, Table]:
    """Keep one of several rows with the same texts and label, in the first split of `PRECEDENCE` that has it."""
    seen: set[Any] = set()
    kept: dict[str, Table] = {}
    removed: dict[str, int] = {}
    for split in PRECEDENCE:
        if split not in tables:
            continue
        rows = []
        for i, key in enumerate(_keys(tables[split].rows, tuple(columns.uses))):
            if key not in seen:
                seen.add(key)
                rows.append(i)
        removed[split] = len(tables[split]) - len(rows)
        kept[split] = tables[split] if not removed[split] else tables[split].select(rows)
    if any(removed.values()):
        say(f"data: {counts(removed)} left out, because they occur more than once")
    return {split: kept[split] for split in tables}


def report_duplicates(splits: Mapping[str, Any], columns: Columns) -> None:
    """Say how many rows occur in several splits or more than once, and how many texts have different labels."""
    keys = {split: _keys(rows, tuple(columns.uses)) for split, rows in splits.items()}
    train = set(keys["train"])
    facts = []
    for split in ("test", "validation"):
        if split in keys and (shared := sum(key in train for key in keys[split])):
            facts.append(f"{shared} of {len(keys[split])} rows of {split} are also training rows")
    if repeated := len(keys["train"]) - len(train):
        facts.append(f"{repeated} training rows repeat another one")
    if columns.classes is not None and (conflicts := _conflicts(splits, columns)):
        facts.append(f"{conflicts} texts have different labels")
    if facts:
        say(f"data: {'; '.join(facts)} (data.deduplicate: true keeps one of equal rows)")


def _keys(rows: Any, columns: tuple[str, ...]) -> list[tuple[Any, ...]]:
    return list(zip(*(_comparable(rows[column][:]) for column in columns), strict=True))


def _comparable(values: list[Any]) -> list[Any]:
    """The values of a column; lists and objects as JSON."""
    return [json_text(value) if isinstance(value, list | dict) else value for value in values]


def _conflicts(splits: Mapping[str, Any], columns: Columns) -> int:
    labels: dict[tuple[Any, ...], Any] = {}
    conflicts = set()
    for rows in splits.values():
        names = getattr(rows.features[columns.label], "names", None)
        for text, label in zip(_keys(rows, columns.inputs), rows[columns.label][:], strict=True):
            name = names[label] if names else label
            if labels.setdefault(text, name) != name:
                conflicts.add(text)
    return len(conflicts)
