"""A table of rows written as CSV, TSV, JSON lines or Parquet, by the ending of its name."""

import csv
import io
import json
from pathlib import Path

import pyarrow as pa

from fedelta.errors import FedeltaError
from fedelta.files import write_file

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")


def check_output(path: Path, overwrite: bool) -> None:
    """Raise unless a file can be written here.

    Raises:
        FedeltaError: if the ending is not known, or something exists there that must not be replaced.
    """
    if path.suffix.lower() not in ENDINGS:
        raise FedeltaError(f"{path}: unknown ending, expected one of {', '.join(ENDINGS)}")
    if path.is_dir():
        raise FedeltaError(f"{path} is a folder, expected the name of a file")
    if path.exists() and not overwrite:
        raise FedeltaError(f"{path} already exists; --overwrite replaces it")


def write_rows(path: Path, table: pa.Table) -> None:
    r"""Write the table atomically. Lines of CSV and TSV end in \r\n, as RFC 4180 asks for.

    Raises:
        FedeltaError: naming a column that the format can't hold.
    """
    ending = path.suffix.lower()
    if ending == ".parquet":
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata(None), sink)
        write_file(path, sink.getvalue().to_pybytes())
    elif ending == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in table.to_pylist())
        write_file(path, "".join(lines).encode("utf-8", "surrogatepass"))
    else:
        write_file(path, _delimited(path, table, "\t" if ending == ".tsv" else ","))


def _delimited(path: Path, table: pa.Table, delimiter: str) -> str:
    for field in table.schema:
        if pa.types.is_nested(field.type):
            raise FedeltaError(f"{path}: column {field.name[:40]!r} holds lists or objects; write .jsonl or .parquet")
    text = io.StringIO()
    # With these line ends, Python also quotes a cell that holds a lone \r, which readers take for the end of a row.
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\r\n")
    writer.writerow(table.column_names)
    for batch in table.to_batches():
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            writer.writerow(["" if value is None else value for value in row])
    return text.getvalue()
