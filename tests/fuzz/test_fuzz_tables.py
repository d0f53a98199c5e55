"""Tables of any content: every cell is read as the text that stands there, or the file is refused."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedelta.errors import FedeltaError
from fedelta.learning.data.settings import Columns, DataSettings
from fedelta.learning.data.sources import load_rows
from fuzzing import damaged_bytes, fuzz, refused

COLUMNS = ["text", "label", "site"]
LOOKS_LIKE = [
    "007",
    "3.50",
    "1e5",
    "+49 30 1",
    "NA",
    "None",
    "null",
    "nan",
    "true",
    "2024-01-01",
    "1,5",
    '"',
    '""',
    "'",
]
LOOKS_LIKE += [
    "-1",
    "0x1F",
    "١٢",
    "=1+1",
    "#",
    "a\tb",
    "a;b",
    "a|b",
    "a,b",
    "line\nbreak",
    "\ufeffx",
    "é",
    "1_000",
    "∞",
]


def cells() -> st.SearchStrategy[str]:
    """Cells that look like numbers, dates, missing values or separators, and any others that are not blank."""
    letters = st.characters(exclude_categories=["Cs", "Cc"])
    return st.sampled_from(LOOKS_LIKE) | st.text(letters, min_size=1, max_size=12).filter(
        lambda text: text.strip() == text
    )


def tables() -> st.SearchStrategy[list[list[str]]]:
    return st.lists(st.lists(cells(), min_size=3, max_size=3), min_size=3, max_size=8)


def as_csv(rows: list[list[str]], delimiter: str, encoding: str) -> bytes:
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter).writerows([COLUMNS, *rows])
    return stream.getvalue().encode(encoding)


def as_jsonl(rows: list[list[str]]) -> bytes:
    return "".join(json.dumps(dict(zip(COLUMNS, row, strict=True))) + "\n" for row in rows).encode()


def as_json(rows: list[list[str]]) -> bytes:
    return json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in rows], ensure_ascii=False).encode()


def read(file: Path, **settings: Any) -> list[list[str]]:
    columns = Columns(dict.fromkeys(COLUMNS, "text"), tuple((column,) for column in COLUMNS))
    rows = load_rows(DataSettings(source=str(file), **settings), columns)
    return [list(row) for row in zip(*(rows[column][:] for column in COLUMNS), strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@fuzz(examples=60)
@given(rows=tables(), delimiter=st.sampled_from(",;|"), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_every_cell_of_a_csv_is_read_as_it_stands(
    folder: Path, rows: list[list[str]], delimiter: str, encoding: str
) -> None:
    file = folder / "table.csv"
    file.write_bytes(as_csv(rows, delimiter, encoding))
    settings = {"delimiter": delimiter, "encoding": encoding}
    assert refused("tables", lambda: read(file, **settings), FedeltaError) == rows


@fuzz(examples=40)
@given(rows=tables(), write=st.sampled_from([as_json, as_jsonl]))
def test_every_text_of_a_json_file_is_read_as_it_stands(
    folder: Path, rows: list[list[str]], write: Callable[[list[list[str]]], bytes]
) -> None:
    file = folder / ("table.json" if write is as_json else "table.jsonl")
    file.write_bytes(write(rows))
    assert refused("tables", lambda: read(file), FedeltaError) == rows


EXAMPLE = [[f"text {i}", str(i % 2), f"site-{i % 3}"] for i in range(12)]


@fuzz(examples=60)
@given(data=st.data(), name=st.sampled_from(["t.csv", "t.tsv", "t.jsonl", "t.json", "t.csv.gz"]))
def test_a_damaged_table_is_read_or_refused(folder: Path, data: st.DataObject, name: str) -> None:
    file = folder / name
    content = {
        "t.csv": as_csv(EXAMPLE, ",", "utf-8"),
        "t.tsv": as_csv(EXAMPLE, "\t", "utf-8"),
        "t.jsonl": as_jsonl(EXAMPLE),
        "t.json": as_json(EXAMPLE),
        "t.csv.gz": as_csv(EXAMPLE, ",", "utf-8"),
    }[name]
    file.write_bytes(data.draw(damaged_bytes(content)))
    found = refused("tables", lambda: read(file), FedeltaError)
    if not isinstance(found, FedeltaError):
        assert all(isinstance(cell, str) for row in found for cell in row)
