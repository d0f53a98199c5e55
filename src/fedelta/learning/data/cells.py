"""Checks of the columns that a task reads: their types, and their empty cells."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedelta.errors import FedeltaError, quantity
from fedelta.learning.data.settings import Columns, DataSettings, Use
from fedelta.learning.data.table import NESTED, Table, listed, say, shorten

EXPECTED: dict[Use, str] = {
    "text": "text",
    "cell": "text or numbers",
    "messages": "messages (a list of objects, or its JSON text) or text",
    "class": "classes: text or whole numbers",
    "number": "numbers",
}


class IncompleteRow(FedeltaError):
    """A row lacks something that its task needs. `data.missing` says what happens to it, as to empty cells."""


class RefusedRow(FedeltaError):
    """A row that can't become tokens.

    Args:
        row: its index in the split.
        reason: why it is refused.
    """

    def __init__(self, row: int, reason: object) -> None:
        super().__init__(f"row {row + 1}: {reason}")
        self.row = row
        self.reason = reason


def check_columns(source: str, split: str, table: Table, columns: Columns) -> None:
    """Check that a split has the columns, with types that fit their use.

    Raises:
        FedeltaError: naming the column, what it holds and what was expected.
    """
    for column, use in columns.uses.items():
        if column not in table.rows.column_names:
            found = listed(table.rows.column_names)
            hint = ""
            if table.places.units[0] == "line" and set(columns.uses).isdisjoint(table.rows.column_names):
                hint = "; without a header line, name the columns with data.columns"
            raise FedeltaError(f"data source {source}: no column {column!r} in split {split}, found {found}{hint}")
        if column in table.mixed and not (use == "messages" and table.mixed[column] == NESTED):
            raise FedeltaError(
                f"column {shorten(column, 40)!r} mixes types, expected {EXPECTED[use]}: {table.mixed[column]}"
            )
        kind = _kind(table.rows.features[column])
        if not _fits(kind, use):
            raise FedeltaError(f"data source {source}: column {column!r} holds {kind}, expected {EXPECTED[use]}")


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or "lists or objects")


def _fits(kind: str, use: Use) -> bool:
    text = kind in ("string", "large_string", "null")
    number = kind.startswith(("int", "uint", "float"))
    if use == "text":
        return text
    if use == "messages":
        return text or kind.startswith(("list", "struct"))
    if use == "cell":
        return not kind.startswith(("list", "struct", "binary", "large_binary"))
    return text or number or (kind == "bool" and use == "class")


def complete_rows(
    source: str, tables: Mapping[str, Table], columns: Columns, settings: DataSettings
) -> dict[str, Table]:
    """Find the rows with empty cells. `data.missing` says whether they are refused or left out.

    A cell is empty if it is null, NaN, or a text of white space only.

    Raises:
        FedeltaError: naming the first such cell and the number of others, or a split in which no row is left.
    """
    complete: dict[str, Table] = {}
    dropped: dict[str, int] = {}
    for split, table in tables.items():
        empty = np.zeros(len(table), bool)
        columns_empty = np.full(len(table), "", object)
        for group in columns.required:
            missing = np.logical_and.reduce([empty_cells(table.rows, column) for column in group])
            columns_empty[missing & ~empty] = group[0]
            empty |= missing
        rows = np.flatnonzero(empty)
        if len(rows) == len(table):
            column = shorten(columns_empty[0], 40)
            raise FedeltaError(
                f"data source {source}: every row of {split} has an empty cell, the first in column {column!r}; other "
                "splits can be named in data.splits, such as {test: validation, validation: null}"
            )
        if len(rows) and settings.missing == "refuse":
            more = f" (and {quantity(len(rows) - 1, 'more row')})" if len(rows) > 1 else ""
            raise FedeltaError(
                f"{table.places.name(rows[0])}: empty cell in column {shorten(columns_empty[rows[0]], 40)!r} of "
                f"{split}{more}; data.missing: drop leaves out such rows"
            )
        complete[split] = table.select(np.flatnonzero(~empty)) if len(rows) else table
        dropped[split] = len(rows)
    if any(dropped.values()):
        say(f"data: {counts(dropped)} with empty cells left out")
    return complete


def usable_rows(source: str, tables: Mapping[str, Table], columns: Columns, settings: DataSettings) -> dict[str, Table]:
    """Check the cells of each row together. `data.missing` says whether an incomplete row is refused or left out.

    Raises:
        FedeltaError: naming the first row that can't be used, or a split in which no row is left.
    """
    if columns.check is None:
        return dict(tables)
    usable: dict[str, Table] = {}
    dropped: dict[str, int] = {}
    for split, table in tables.items():
        kept = []
        for i, row in enumerate(table.rows.select_columns(list(columns.uses))):
            try:
                columns.check(row)
                kept.append(i)
            except IncompleteRow as error:
                if settings.missing == "refuse":
                    raise FedeltaError(
                        f"{table.places.name(i)}: {error}; data.missing: drop leaves out such rows"
                    ) from error
            except FedeltaError as error:
                raise FedeltaError(f"{table.places.name(i)}: {error}") from error
        if not kept:
            raise FedeltaError(f"data source {source}: no row of {split} is complete")
        usable[split] = table.select(kept) if len(kept) < len(table) else table
        dropped[split] = len(table) - len(kept)
    if any(dropped.values()):
        say(f"data: {counts(dropped)} that are incomplete left out")
    return usable


def counts(rows: Mapping[str, int]) -> str:
    """Numbers of rows by split: `3 rows of train, 1 row of test`."""
    return ", ".join(f"{quantity(number, 'row')} of {split}" for split, number in rows.items() if number)


def empty_cells(rows: Any, column: str) -> np.ndarray:
    """For each row, whether its cell is null, NaN, white space, or a list of nothing."""
    values = column_of(rows, column)
    empty = pc.is_null(values, nan_is_null=pa.types.is_floating(values.type))
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True)
        empty = pc.or_(empty, blank)
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        empty = pc.or_(empty, pc.fill_null(pc.equal(pc.list_value_length(values), 0), True))
    return np.asarray(empty.to_numpy(), bool)


def column_of(rows: Any, column: str) -> pa.ChunkedArray:
    """A column of a `datasets.Dataset` in the order of its rows."""
    table = rows.select_columns([column]).with_format("arrow")[:]
    return table.column(0)
