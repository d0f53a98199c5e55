"""CSV and TSV files. Every cell stays the text that stands there; only its use may make a number of it.

CSV has quotes: a cell that begins with `"` ends with `"`, and `""` inside is a quote. TSV has none, as GLUE's files: a
`"` is a sign like any other, and a line is a row. `data.quoting` changes either.
"""

import csv
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from fedelta.errors import FedeltaError, quantity
from fedelta.learning.data.settings import DataSettings
from fedelta.learning.data.streams import MAX_LINE, lines_of, named, text_of
from fedelta.learning.data.table import Places, Table, as_dataset, listed, say, shorten

DELIMITERS = (",", ";", "\t", "|")
MAX_COLUMNS = 10_000
BATCH = 20_000
Record = tuple[int, list[str]]
"""Number of the line where a row begins, and its cells."""


def read_table(path: Path, kind: str, settings: DataSettings, wanted: Collection[str]) -> Table:
    """Read a CSV or TSV file.

    Args:
        kind: `csv` or `tsv`.
        wanted: columns that will be used, by which the delimiter is recognized.

    Raises:
        FedeltaError: naming the line, if a row has more or fewer cells than the header, or a quote is not closed.
    """
    quoting = settings.quoting if settings.quoting is not None else kind == "csv"
    with text_of(path, settings.encoding) as text, _long_cells():
        lines = lines_of(path, text)
        first, skipped = next(((line, i) for i, line in enumerate(lines) if line.strip()), ("", 0))
        if not first:
            raise FedeltaError(f"data file {named(path)}: the file is empty")
        delimiter = settings.delimiter or ("\t" if kind == "tsv" else None)
        if excel := re.fullmatch(r"sep=(.)\s*", first, re.IGNORECASE):
            delimiter, skipped = settings.delimiter or excel[1], skipped + 1
            first = next(lines, "")
        if delimiter is None:
            delimiter = _delimiter(first, settings.columns or (), wanted, quoting)
            if delimiter != ",":
                say(f"{named(path)}: cells are separated by {delimiter!r}; set data.delimiter if wrong")
        records = _records(path, itertools.chain([first], lines), delimiter, quoting, skipped)
        if settings.columns is None:
            header = [cell.strip() for cell in next(records, (1, []))[1]]
        else:
            header, records = list(settings.columns), _without_header(path, records, settings.columns)
        _check_header(path, header)
        table, numbers = _rows(path, records, header)
    if kind == "tsv" and not quoting:
        _say_if_quoted(path, table)
    return Table(as_dataset(table), Places.of(str(path), numbers, "line"))


@contextmanager
def _long_cells() -> Iterator[None]:
    """Allow cells as long as a line may be. The limit belongs to the whole process, so it is put back."""
    limit = csv.field_size_limit(MAX_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _reader(lines: Iterable[str], delimiter: str, quoting: bool, strict: bool) -> Any:
    rule: Any = csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
    return csv.reader(lines, delimiter=delimiter, quoting=rule, strict=strict)


def _without_header(path: Path, records: Iterator[Record], columns: Sequence[str]) -> Iterator[Record]:
    """The rows of a file whose columns the settings name.

    Raises:
        FedeltaError: if the first row is a header nevertheless. It would be trained as a row.
    """
    for number, (line, cells) in enumerate(records):
        if number == 0 and (names := {cell.strip() for cell in cells} & set(columns)):
            raise FedeltaError(
                f"data file {named(path)}, line {line}: has the name {shorten(min(names), 40)!r} of data.columns; "
                "a file with a header needs no data.columns"
            )
        yield line, cells


def _delimiter(line: str, columns: Sequence[str], wanted: Collection[str], quoting: bool) -> str:
    """The delimiter that finds most of the wanted columns in the first line, and then the one that finds most cells.

    Without a header, the number of cells is that of the columns.
    """

    def fit(delimiter: str) -> tuple[bool, int, int]:
        cells = [cell.strip() for row in _reader([line], delimiter, quoting, strict=False) for cell in row]
        return len(cells) == len(columns), len(set(cells) & set(wanted)), len(cells)

    return max(DELIMITERS, key=fit)


def _records(path: Path, lines: Iterator[str], delimiter: str, quoting: bool, skipped: int) -> Iterator[Record]:
    """Yield the rows that are not empty."""
    reader = _reader(lines, delimiter, quoting, strict=True)
    while True:
        begin = skipped + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise FedeltaError(f"data file {named(path)}, line {begin}: {_explain(str(error))}") from error
        if any(cells):
            yield begin, cells


def _explain(problem: str) -> str:
    if "end of data" in problem:
        return 'a quote (") is not closed; data.quoting: false takes quotes as text'
    if "expected after" in problem:
        return 'a quoted cell that begins here has text after its end, expected "" for a quote inside a cell'
    if "field limit" in problem:
        return f"a cell is longer than {MAX_LINE} characters; is a quote not closed?"
    return shorten(problem, 100)


def _check_header(path: Path, header: Sequence[str]) -> None:
    if len(header) > MAX_COLUMNS:
        raise FedeltaError(f"data file {named(path)}: {len(header)} columns, expected at most {MAX_COLUMNS}")
    seen = set()
    for column in header:
        if column and column in seen:
            raise FedeltaError(f"data file {named(path)}: two columns are named {shorten(column, 60)!r}")
        seen.add(column)
    if not any(header):
        raise FedeltaError(f"data file {named(path)}: no column has a name")


def _rows(path: Path, records: Iterator[Record], header: list[str]) -> tuple[pa.Table, list[int]]:
    """Read all rows into columns of text, and the line of each. Columns without a name are left out."""
    used = [i for i, column in enumerate(header) if column]
    schema = pa.schema([(header[i], pa.large_string()) for i in used])
    numbers: list[int] = []
    batches: list[pa.RecordBatch] = []
    while block := list(itertools.islice(records, BATCH)):
        for line, cells in block:
            if len(cells) != len(header):
                raise FedeltaError(
                    f"data file {named(path)}, line {line}: {quantity(len(cells), 'cell')}, but the header has "
                    f"{len(header)} ({listed(header, 5, 20)})"
                )
        numbers += [line for line, _ in block]
        columns = [pa.array([cells[i] for _, cells in block], pa.large_string()) for i in used]
        batches.append(pa.record_batch(columns, schema=schema))
    if not numbers:
        raise FedeltaError(f"data file {named(path)}: a header, but no rows")
    return pa.Table.from_batches(batches, schema), numbers


def _say_if_quoted(path: Path, table: pa.Table) -> None:
    """Tell if the cells of a file without quoting look as if a program had quoted them."""
    quoted = [
        cell for column in table.columns for chunk in column.chunks for cell in chunk.to_pylist() if cell[:1] == '"'
    ]
    if quoted and all(re.fullmatch(r'"(?:[^"]|"")*"', cell) for cell in quoted):
        say(f"{named(path)}: {quantity(len(quoted), 'cell')} in quotes, which stay; data.quoting: true removes them")
