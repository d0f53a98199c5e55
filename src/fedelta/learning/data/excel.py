"""Excel workbooks, read by openpyxl (extra `excel`)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedelta.errors import FedeltaError
from fedelta.learning.data.json_rows import table_of_rows
from fedelta.learning.data.streams import named, opened
from fedelta.learning.data.table import Places, Table, shorten


def read_excel(path: Path) -> Table:
    """Read the only sheet of a workbook that has rows. Its first row is the header.

    Raises:
        FedeltaError: if openpyxl is missing, the workbook is damaged, or several sheets have rows.
    """
    try:
        import openpyxl
    except ImportError as error:
        raise FedeltaError(
            f"data file {named(path)}: Excel files need openpyxl (pip install 'fedelta[excel]'), or save it as CSV"
        ) from error
    with opened(path) as stream:
        try:
            book = openpyxl.load_workbook(stream, read_only=True, data_only=True)
            sheets = {sheet.title: list(_rows(sheet.iter_rows(values_only=True))) for sheet in book.worksheets}
        except Exception as error:
            raise FedeltaError(f"data file {named(path)}: not an Excel workbook ({type(error).__name__})") from error
    filled = {title: rows for title, rows in sheets.items() if rows}
    if len(filled) != 1:
        raise FedeltaError(f"data file {named(path)}: {len(filled)} sheets have rows, expected one")
    (_, header), *rows = next(iter(filled.values()))
    names = [None if cell is None else str(cell).strip() for cell in header]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise FedeltaError(f"data file {named(path)}: two columns are named {shorten(twice, 60)!r}")
    if not rows:
        raise FedeltaError(f"data file {named(path)}: a header, but no rows")
    cells = [
        {name: _plain(cell) for name, cell in zip(names, row, strict=False) if name is not None} for _, row in rows
    ]
    return table_of_rows(cells, Places.of(str(path), [number for number, _ in rows], "row"))


def _rows(rows: Any) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Rows with their numbers in the sheet, without the empty ones."""
    for number, row in enumerate(rows, 1):
        if any(cell is not None for cell in row):
            yield number, row


def _plain(cell: Any) -> Any:
    """Dates and times become texts."""
    return cell if cell is None or isinstance(cell, bool | int | float | str) else str(cell)
