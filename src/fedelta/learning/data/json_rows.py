"""JSON and JSON lines, and rows of a program: objects become rows, and keys become columns."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from fedelta.errors import FedeltaError
from fedelta.learning.data.streams import lines_of, named, text_of
from fedelta.learning.data.table import NESTED, Places, Table, as_dataset, json_text, listed, shorten

MAX_DOCUMENT = 2**31
"""Longest JSON document that is read as a whole, in characters."""

MAX_COLUMNS = 10_000
Row = Mapping[str, Any]


def read_json(path: Path, kind: str, encoding: str | None) -> Table:
    """Read a file of JSON lines, or a document: a list of objects, an object that holds one such list, or columns.

    Args:
        kind: `jsonl` or `json`. A `.json` file may also hold lines.
        encoding: encoding of the text; None detects it.

    Raises:
        FedeltaError: naming the line that is not JSON, or not an object.
    """
    with text_of(path, encoding) as text:
        if kind == "jsonl":
            return _from_lines(path, lines_of(path, text))
        document = text.read(MAX_DOCUMENT)
    if len(document) == MAX_DOCUMENT:
        raise FedeltaError(f"data file {named(path)}: larger than 2 GB, expected JSON lines (.jsonl)")
    try:
        content = _parse(document)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _from_lines(path, document.split("\n"))
        raise FedeltaError(f"data file {named(path)}, line {error.lineno}: not JSON ({error.msg})") from error
    except (RecursionError, ValueError) as error:
        raise FedeltaError(f"data file {named(path)}: not JSON ({shorten(error, 80)})") from error
    rows = _rows_in(path, content)
    return table_of_rows(rows, Places.of(str(path), range(1, len(rows) + 1), "row"))


def _from_lines(path: Path, lines: Iterable[str]) -> Table:
    rows, numbers = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except (RecursionError, ValueError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else shorten(error, 80)
            raise FedeltaError(f"data file {named(path)}, line {number}: not JSON ({reason})") from error
        if not isinstance(row, dict):
            kind = KINDS.get(type(row), "null")
            raise FedeltaError(f"data file {named(path)}, line {number}: {kind}, expected an object such as {{...}}")
        rows.append(row)
        numbers.append(number)
    if not rows:
        raise FedeltaError(f"data file {named(path)}: the file is empty")
    return table_of_rows(rows, Places.of(str(path), numbers, "line"))


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Python would silently take the last of several equal keys."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shorten(double, 40)!r} occurs twice in an object")
    return content


def _rows_in(path: Path, content: Any) -> Sequence[Row]:
    """The rows of a document."""
    if isinstance(content, dict):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        of_rows = {key: value for key, value in lists.items() if value and all(isinstance(v, dict) for v in value)}
        if len(of_rows) == 1 and len(lists) == 1:
            content = next(iter(of_rows.values()))
        elif (
            lists and len(lists) == len(content) and len({len(value) for value in lists.values()}) == 1 and not of_rows
        ):
            content = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        else:
            raise FedeltaError(
                f"data file {named(path)}: an object with {listed(map(repr, content), 5)}, expected a list of objects, "
                "an object with one such list, or one file for each split"
            )
    if not isinstance(content, list) or not content:
        raise FedeltaError(f"data file {named(path)}: expected a list of objects, found no rows")
    for number, row in enumerate(content, 1):
        if not isinstance(row, dict):
            kind = KINDS.get(type(row), "null")
            raise FedeltaError(f"data file {named(path)}, row {number}: {kind}, expected an object such as {{...}}")
    return content


KINDS: dict[type, str] = {
    bool: "a truth value",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list",
    tuple: "a list",
    dict: "an object",
}


def table_of_rows(rows: Sequence[Row], places: Places) -> Table:
    """Put rows into columns. A key that a row lacks is an empty cell there.

    A column with whole numbers and others, or very large ones, keeps how each is written, as text. A column with values
    of different types is kept as JSON text and marked, because it matters only if it is used. So is a column of lists
    or objects that Arrow can't hold as they are.

    Raises:
        FedeltaError: if a text is not valid Unicode, or there are too many columns.
    """
    names = list(dict.fromkeys(key for row in rows for key in row))
    if len(names) > MAX_COLUMNS or not names:
        raise FedeltaError(f"data source {places.files[0]}: {len(names)} columns, expected 1 to {MAX_COLUMNS}")
    mixed: dict[str, str] = {}
    arrays = []
    for name in names:
        # NaN is how pandas writes a missing value.
        values = [None if (value := row.get(name)) != value else value for row in rows]
        if why := _different_types(values, places):
            mixed[name] = why
            values = [None if value is None else json.dumps(value, default=str) for value in values]
        elif {type(value) for value in values} >= {int, float} or any(
            type(value) is int and abs(value) >= 2**63 for value in values
        ):
            values = [None if value is None else repr(value) for value in values]
        try:
            array = _array(values)
            held = _holds(array, values)
        except UnicodeEncodeError as error:
            raise _not_unicode(name, values, places) from error
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            held = False
            if not all(map(_valid, values)):
                raise _not_unicode(name, values, places) from error
        if not held:
            mixed.setdefault(name, NESTED)
            array = _array([None if value is None else json.dumps(value, default=str) for value in values])
        arrays.append(array)
    return Table(as_dataset(pa.table(dict(zip(names, arrays, strict=True)))), places, mixed)


def _array(values: list[Any]) -> pa.Array:
    texts = all(value is None or isinstance(value, str) for value in values)
    return pa.array(values, pa.large_string() if texts else None)


def _holds(array: pa.Array, values: list[Any]) -> bool:
    """Tell whether lists and objects in Arrow are those that were given.

    It may turn 1 into 1.0, reorder keys, or cut a key at a null character.
    """
    if not pa.types.is_nested(array.type):
        return True
    given = map(json_text, values)
    return all(
        text is None or (json_text(own) == text and r"\u0000" not in text)
        for own, text in zip(array.to_pylist(), given, strict=True)
    )


def _not_unicode(name: str, values: Sequence[Any], places: Places) -> FedeltaError:
    bad = next(i for i, value in enumerate(values) if not _valid(value))
    return FedeltaError(f"{places.name(bad)}: column {shorten(name, 40)!r} is not valid Unicode")


def _valid(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def _different_types(values: Sequence[Any], places: Places) -> str | None:
    """Two values of different types and their places; None if all have one type."""
    first: tuple[int, str] | None = None
    for i, kind in _kinds(values):
        if first is None:
            first = i, kind
        elif kind != first[1]:
            value = shorten(repr(values[i]), 30)
            return f"{places.name(i)} has {kind} ({value}), but {places.name(first[0])} has {first[1]}"
    return None


def _kinds(values: Sequence[Any]) -> Iterator[tuple[int, str]]:
    for i, value in enumerate(values):
        if value is not None:
            yield i, KINDS.get(type(value), type(value).__name__)
