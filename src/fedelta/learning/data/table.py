"""Rows with the place where each stands in its source, so that a message can name the file and the line."""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from fedelta.errors import FedeltaError

FILE_COLUMN = "__file__"
"""Column that a source of several files gets: the name of the row's file, for a natural partition by file."""

NESTED = "nested values of different types"
"""Why a column of lists or objects is kept as JSON text: Arrow can't hold its values as they are written."""


class DataWarning(UserWarning):
    """Something about the data that the user should know, in one line."""


def say(line: str) -> None:
    """Show a line about the data. Equal lines are shown once."""
    warnings.warn(shorten(line, 290), DataWarning, stacklevel=3)


@dataclass(frozen=True, eq=False)
class Places:
    """Where each row stands.

    Args:
        files: names of the files or splits.
        file: for each row, the index of its file.
        number: for each row, its number in the file, from 1.
        units: for each file, what is counted: `line` or `row`.
    """

    files: tuple[str, ...]
    file: np.ndarray  # (rows,)
    number: np.ndarray  # (rows,)
    units: tuple[str, ...]

    @classmethod
    def of(cls, name: str, numbers: Sequence[int] | np.ndarray, unit: str) -> "Places":
        return cls((name,), np.zeros(len(numbers), np.int32), np.asarray(numbers, np.int64), (unit,))

    @classmethod
    def joined(cls, parts: Sequence["Places"]) -> "Places":
        starts = np.cumsum([0, *(len(part.files) for part in parts)])
        return cls(
            tuple(name for part in parts for name in part.files),
            np.concatenate([part.file + start for part, start in zip(parts, starts, strict=False)]),
            np.concatenate([part.number for part in parts]),
            tuple(unit for part in parts for unit in part.units),
        )

    def select(self, rows: Sequence[int] | np.ndarray) -> "Places":
        return Places(self.files, self.file[rows], self.number[rows], self.units)

    def name(self, row: int) -> str:
        """The place of a row in words: `texts.csv, line 7`."""
        file = int(self.file[row])
        return f"{shorten(self.files[file], 60, end=True)}, {self.units[file]} {int(self.number[row])}"


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of one split.

    Args:
        rows: a `datasets.Dataset`.
        places: where each row stands.
        mixed: column → why it can't be read, for columns whose values have different types. It matters only if the
            column is used.
    """

    rows: Any
    places: Places
    mixed: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.rows.num_rows

    def select(self, rows: Sequence[int] | np.ndarray) -> "Table":
        indices = np.asarray(rows, np.int64)
        return Table(self.rows.select(indices), self.places.select(indices), self.mixed)

    def with_column(self, name: str, values: Sequence[Any], feature: Any) -> "Table":
        """The same rows with another content of one column."""
        position = self.rows.column_names.index(name)
        names = list(self.rows.column_names)
        rows = self.rows.remove_columns(name).add_column(name, list(values), feature=feature)
        names.insert(position, names.pop(position))
        return Table(rows.select_columns(names), self.places, self.mixed)


def as_dataset(table: pa.Table) -> Any:
    """Wrap an Arrow table as a `datasets.Dataset` in memory.

    Categories become their values. Columns of types that a `Dataset` can't hold, such as maps, are left out.
    """
    import datasets

    for column in table.schema:
        i = table.schema.get_field_index(column.name)
        if pa.types.is_dictionary(column.type):
            table = table.set_column(i, column.name, table.column(i).cast(column.type.value_type))
        elif pa.types.is_string_view(column.type):
            table = table.set_column(i, column.name, table.column(i).cast(pa.large_string()))
        else:
            try:
                datasets.Features.from_arrow_schema(pa.schema([column]))
            except (ValueError, NotImplementedError):
                table = table.remove_column(i)
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def loaded_table(name: str, rows: Any) -> Table:
    """A `datasets.Dataset` as a table."""
    return Table(rows, Places.of(name, range(1, rows.num_rows + 1), "row"))


def join(name: str, tables: Sequence[Table]) -> Table:
    """Append tables with the same columns.

    Raises:
        FedeltaError: if the columns or their types differ.
    """
    import datasets

    if len(tables) == 1:
        return tables[0]
    first = tables[0]
    for table in tables[1:]:
        if set(table.rows.column_names) != set(first.rows.column_names):
            own, other = set(first.rows.column_names), set(table.rows.column_names)
            column = sorted(own ^ other)[0]
            has, lacks = (first, table) if column in own else (table, first)
            with_it, without = (shorten(each.places.files[0], 70, end=True) for each in (has, lacks))
            raise FedeltaError(
                f"data source {shorten(name, 60)}: {with_it} has a column {shorten(column, 40)!r} and {without} has "
                "not, expected the same columns in all files"
            )
    tables = _alike(tables)
    try:
        rows = datasets.concatenate_datasets([table.rows for table in tables])
    except Exception as error:
        raise FedeltaError(
            f"data source {shorten(name, 80)}: {first.places.files[0]} and other files have columns of different types"
        ) from error
    mixed = {column: why for table in tables for column, why in table.mixed.items()}
    return Table(rows, Places.joined([table.places for table in tables]), mixed)


def _alike(tables: Sequence[Table]) -> list[Table]:
    """The same tables. A column of lists or objects whose types differ between them becomes JSON text in all.

    Messages differ so if only one file has tool calls, for example.
    """
    import datasets

    result = list(tables)
    for name in tables[0].rows.column_names:
        features = [table.rows.features[name] for table in tables]
        nested = [not isinstance(feature, datasets.Value) and not hasattr(feature, "names") for feature in features]
        if not any(nested) or all(feature == features[0] for feature in features):
            continue
        if all(own or table.mixed.get(name) == NESTED for own, table in zip(nested, tables, strict=True)):
            for i, own in enumerate(nested):
                table = result[i]
                values = [json_text(value) if own else value for value in table.rows[name][:]]
                table = table.with_column(name, values, datasets.Value("large_string"))
                result[i] = Table(table.rows, table.places, {**table.mixed, name: NESTED})
    return result


def json_text(value: Any) -> str | None:
    """JSON of a list or object, without the keys that have no value."""
    return None if value is None else json.dumps(without_none(value), default=str)


def without_none(value: Any) -> Any:
    """A value without the keys of its objects that have no value.

    Arrow gives all objects of a column the same keys, and those that one lacks have no value there.
    """
    if isinstance(value, Mapping):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [without_none(inner) for inner in value]
    return value


def shorten(text: object, length: int, end: bool = False) -> str:
    """A text cut to `length` characters, with `…` where it was cut: behind, or in front if its `end` matters."""
    line = str(text)
    if len(line) <= length:
        return line
    return "…" + line[len(line) - length + 1 :] if end else line[: length - 1] + "…"


def listed(names: Iterable[object], count: int = 8, length: int = 30) -> str:
    """The first `count` names, and how many more there are."""
    every = [shorten(name, length) for name in names]
    more = f" and {len(every) - count} more" if len(every) > count else ""
    return ", ".join(every[:count]) + more
