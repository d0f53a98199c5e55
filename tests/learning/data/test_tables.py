"""CSV, TSV and JSON files: text stays text, and a row that does not fit is refused with its line."""

import bz2
import gzip
import json
import lzma
import zipfile
from pathlib import Path

import pytest

from fedelta.errors import FedeltaError
from fedelta.learning.data import DataSettings
from fedelta.learning.data.files import read_file
from fedelta.learning.data.table import DataWarning, Table


def read(file: Path, **settings: object) -> Table:
    return read_file(file, DataSettings(**settings), ("text", "label"))  # type: ignore[arg-type]


def columns(table: Table) -> dict[str, list[object]]:
    return {name: table.rows[name][:] for name in table.rows.column_names}


def write(file: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    file.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return file


CELLS = ["007", "3.50", "1e5", "+49 30 1", "NA", "None", "null", "nan", "True", "1,5", " x ", "2024-01-02", "0x10"]


def test_cells_keep_the_text_that_stands_there(tmp_path: Path) -> None:
    quoted = [f'"{cell}"' for cell in CELLS]
    csv = write(tmp_path / "x.csv", "text,label\n" + "".join(f"{a},{a}\n" for a in quoted))
    tsv = write(tmp_path / "x.tsv", "text\tlabel\n" + "".join(f"{a}\t{a}\n" for a in CELLS))
    jsonl = write(tmp_path / "x.jsonl", "".join(json.dumps({"text": a, "label": a}) + "\n" for a in CELLS))
    for file in (csv, tsv, jsonl):
        assert columns(read(file)) == {"text": CELLS, "label": CELLS}


def test_numbers_of_several_kinds_in_json_keep_how_they_are_written(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", "".join(f'{{"text": {n}, "label": 1}}\n' for n in ("1", "2.5", str(10**30))))
    assert columns(read(file)) == {"text": ["1", "2.5", str(10**30)], "label": [1, 1, 1]}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.csv", "text,label\na,b\nc,d,e\n", "line 3: 3 cells, but the header has 2 (text, label)"),
        ("x.csv", 'text,label\n"a\nb",x\nc\n', "line 4: 1 cell, but the header has 2"),
        ("x.csv", 'text,label\na,b\n"c,d\ne,f\n', 'line 3: a quote (") is not closed; data.quoting: false'),
        ("x.csv", 'text,label\n"a,x\n"b,y\n', "line 2: a quoted cell that begins here has text after its end"),
        ("x.csv", "text,label,text\n", "two columns are named 'text'"),
        ("x.csv", "", "the file is empty"),
        ("x.csv", "\n \n", "the file is empty"),
        ("x.csv", "text,label\n", "a header, but no rows"),
        ("x.csv", "text,label\na,b\na\0,b\n", "line 3: a NUL character"),
        ("x.csv", "text,label\na," + "b" * 2**24, "line 2: longer than 16777216 characters"),
        ("x.csv", ",".join(f"c{i}" for i in range(100_000)), "100000 columns, expected at most 10000"),
        ("x.csv", "текст,label\nпривет мир,b\n".encode("cp1251"), "line 1: not UTF-8; set data.encoding"),
        ("x.csv", "text,label\nGrüße,b\n".encode() + b"\xc3,x\n", "line 3: not UTF-8; set data.encoding"),
        ("x.tsv", "text\tlabel\na\tb\tc\n", "line 2: 3 cells, but the header has 2"),
        ("x.jsonl", '{"text": "a"}\n\n{"text": \n', "line 3: not JSON (Expecting value)"),
        ("x.jsonl", '{"text": "a"}\n[1]\n', "line 2: a list, expected an object"),
        ("x.jsonl", "[" * 100_000, "line 1: not JSON (maximum recursion depth"),
        ("x.jsonl", '{"text": "a", "text": "b"}\n', "line 1: not JSON (the key 'text' occurs twice"),
        ("x.jsonl", '{"text": "\\ud800"}\n', "line 1: column 'text' is not valid Unicode"),
        ("x.json", '{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "an object with 'train', 'test', expected"),
        ("x.json", "[]", "expected a list of objects, found no rows"),
        ("x.csv.gz", gzip.compress(b"text,label\na,b\n")[:-9], "the compressed file is damaged"),
        ("x.csv.gz", "text,label\na,b\n", "the compressed file is damaged"),
        ("x.zip", "text,label\na,b\n", "the compressed file is damaged"),
        ("x.txt", "text,label\na,b\n", "unknown extension, expected one of .csv, .tsv"),
        ("x.parquet", b"PAR1 this is not parquet", "not a Parquet file that can be read"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(
    name: str, content: str | bytes, reason: str, tmp_path: Path
) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(FedeltaError) as refusal:
        read(file)
    line = str(refusal.value)
    assert reason in line
    assert str(file)[-20:] in line
    assert len(line) < 300
    assert "\n" not in line


def test_the_rows_of_a_tsv_file_have_no_quotes(tmp_path: Path) -> None:
    file = write(tmp_path / "x.tsv", 'text\tlabel\n"A, he said.\tx\nsay "no"\ty\n"\tz\n')
    assert columns(read(file)) == {"text": ['"A, he said.', 'say "no"', '"'], "label": ["x", "y", "z"]}
    with pytest.raises(FedeltaError, match=r'line 4: a quote \("\) is not closed'):
        read(write(tmp_path / "y.tsv", 'text\tlabel\na\tb\nc\td\n"e\tf\n'), quoting=True)


def test_a_tsv_file_that_a_program_has_quoted_is_said(tmp_path: Path) -> None:
    file = write(tmp_path / "x.tsv", 'text\tlabel\n"a ""b"""\tx\nc\ty\n')
    with pytest.warns(DataWarning, match="1 cell in quotes, which stay; data.quoting: true removes them"):
        assert columns(read(file))["text"] == ['"a ""b"""', "c"]
    assert columns(read(file, quoting=True))["text"] == ['a "b"', "c"]


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_another_delimiter_is_found_and_said(delimiter: str, tmp_path: Path) -> None:
    file = write(
        tmp_path / "x.csv", f"text, with a comma{delimiter}text{delimiter}label\n1{delimiter}a,b{delimiter}c\n"
    )
    with pytest.warns(DataWarning, match="cells are separated by"):
        assert columns(read(file)) == {"text, with a comma": ["1"], "text": ["a,b"], "label": ["c"]}
    assert len(columns(read(file, delimiter=delimiter))) == 3


def test_what_excel_adds_is_not_a_row(tmp_path: Path) -> None:
    file = write(tmp_path / "x.csv", "sep=;\r\ntext;label;;\r\na;b;;\r\n;;;\r\n")
    assert columns(read(file, delimiter=";")) == {"text": ["a"], "label": ["b"]}
    assert read(file, delimiter=";").places.name(0).endswith("x.csv, line 3")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(encoding: str, tmp_path: Path) -> None:
    file = write(tmp_path / "x.csv", "text,label\nüber Łódź,語\n", encoding)
    assert columns(read(file)) == {"text": ["über Łódź"], "label": ["語"]}
    file = write(tmp_path / "x.jsonl", '{"text": "語"}\n', encoding)
    assert columns(read(file)) == {"text": ["語"]}


def test_a_guessed_encoding_is_said_with_a_word(tmp_path: Path) -> None:
    file = write(tmp_path / "x.csv", "text,label\nein Satz über Straßen,gut\n", "cp1252")
    with pytest.warns(DataWarning, match="not UTF-8 and was read as cp1252 .line 2: 'über'.; set data.encoding"):
        assert columns(read(file))["text"] == ["ein Satz über Straßen"]
    assert columns(read(write(tmp_path / "y.csv", "text,label\nпривет,b\n", "cp1251"), encoding="cp1251"))["text"] == [
        "привет"
    ]


def test_the_columns_of_a_file_without_a_header_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "x.tsv", "gj04\t1\t\tOur friends won't buy this.\ngj04\t0\t*\tThey made him angry to.\n")
    table = read(file, columns=("source", "label", "mark", "text"))
    assert columns(table)["label"] == ["1", "0"]
    assert table.places.name(0).endswith("x.tsv, line 1")
    with pytest.raises(FedeltaError, match="line 1: has the name '0' of data.columns; a file with a header needs no"):
        read(write(tmp_path / "y.tsv", "0\t1\n"), columns=("0", "text"))
    with pytest.raises(FedeltaError, match="data.columns is set, but .*x.jsonl is neither a CSV nor a TSV file"):
        read(write(tmp_path / "x.jsonl", "{}"), columns=("a", "b"))


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zip", ".GZ"])
def test_compressed_files_are_read(ending: str, tmp_path: Path) -> None:
    content = b"text,label\na,b\n"
    file = tmp_path / f"x.CSV{ending}"
    if ending == ".zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("folder/y.csv", content)
    else:
        file.write_bytes({".gz": gzip, ".bz2": bz2, ".xz": lzma}[ending.lower()].compress(content))  # type: ignore[attr-defined]
    assert columns(read(file)) == {"text": ["a"], "label": ["b"]}


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a", "label": "b"}]',
        '{"version": 1, "data": [{"text": "a", "label": "b"}]}',
        '{"text": ["a"], "label": ["b"]}',
        '{"text": "a", "label": "b"}\n{"text": "c", "label": "d"}',
    ],
)
def test_json_documents_of_several_shapes_are_read(content: str, tmp_path: Path) -> None:
    assert columns(read(write(tmp_path / "x.json", content)))["text"][0] == "a"


def test_an_excel_sheet_is_read_or_refused_for_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "x.xlsx"
    try:
        import openpyxl
    except ImportError:
        with pytest.raises(FedeltaError, match=r"need openpyxl \(pip install 'fedelta\[excel\]'\), or save it as CSV"):
            read(write(file, b"PK"))
        return
    book = openpyxl.Workbook()
    for row in (["text", "label"], ["a", 1], [None, None], ["b", 2]):
        book.active.append(row)
    book.save(file)
    assert columns(read(file)) == {"text": ["a", "b"], "label": [1, 2]}
    assert read(file).places.name(1).endswith("x.xlsx, row 4")
    book.create_sheet("more").append(["c"])
    book.save(file)
    with pytest.raises(FedeltaError, match="2 sheets have rows, expected one"):
        read(file)
