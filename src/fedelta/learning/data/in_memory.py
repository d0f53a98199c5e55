"""Data that the calling program has loaded already.

A configuration is plain data that a run writes down, so it cannot hold rows. They are kept here, under a name made of
a digest of their content, and a configuration refers to that name. A run can therefore only be resumed with the same
data.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fedelta.errors import FedeltaError
from fedelta.learning.data.json_rows import table_of_rows
from fedelta.learning.data.table import Places, Table, as_dataset, loaded_table, shorten

PREFIX = "memory:"
_data: dict[str, dict[str, Table]] = {}


def remember_data(data: Any) -> str:
    """Keep data for the runs of this process.

    Args:
        data: a `datasets.Dataset`, a pandas DataFrame or a list of dicts (training rows alone; validation and test are
            drawn from them), or a mapping of split names to these.

    Returns:
        The name under which `data.source` refers to it.

    Raises:
        FedeltaError: if it is none of these, or has no rows.
    """
    splits: dict[str, Any] = dict(data) if isinstance(data, Mapping) else {"train": data}
    tables = {str(name): memory_table(f"split {shorten(name, 40)}", rows) for name, rows in splits.items()}
    if not tables:
        raise FedeltaError("data: no splits, expected at least one named train")
    sha = hashlib.sha256()
    for name, table in tables.items():
        sha.update(name.encode())
        sha.update(_content(table.rows))
    source = f"{PREFIX}{sha.hexdigest()[:16]}"
    _data[source] = tables
    return source


def memory_table(place: str, rows: Any) -> Table:
    """Rows of a `datasets.Dataset`, a DataFrame or a list of dicts. Messages name `place` and count rows from 1.

    Raises:
        FedeltaError: if it is none of these, or has no rows.
    """
    from datasets import Dataset

    if isinstance(rows, Sequence) and rows and all(isinstance(row, Mapping) for row in rows):
        plain = [{str(key): _plain(value) for key, value in row.items()} for row in rows]
        return table_of_rows(plain, Places.of(place, range(1, len(rows) + 1), "row"))
    if _is_frame(rows) and len(rows):
        if not rows.columns.is_unique:
            twice = rows.columns[rows.columns.duplicated()][0]
            raise FedeltaError(f"data: {place} has two columns named {shorten(twice, 60)!r}")
        try:
            table = pa.Table.from_pandas(rows, preserve_index=False)
            # Arrow may change numbers inside of lists and objects, which are therefore read row by row.
            if not any(pa.types.is_nested(column.type) for column in table.schema):
                return loaded_table(place, as_dataset(table))
        except (pa.ArrowException, TypeError, ValueError, NotImplementedError):
            # Columns of different types: read row by row, which names the rows.
            pass
        return memory_table(place, [{str(k): v for k, v in row.items()} for row in rows.to_dict("records")])
    if isinstance(rows, Dataset) and rows.num_rows:
        return loaded_table(place, rows)
    raise FedeltaError(
        f"data: {place} is a {type(rows).__name__}, "
        "expected a datasets.Dataset, a DataFrame or a list of dicts, with rows"
    )


def _is_frame(rows: Any) -> bool:
    import pandas as pd

    return isinstance(rows, pd.DataFrame)


def _plain(value: Any) -> Any:
    """Numbers and arrays of NumPy as Python's, and the missing values of pandas as None, also inside lists."""
    import pandas as pd

    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    if value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value):
        return None
    return value


def _content(rows: Any) -> bytes:
    """The rows in order, as bytes that depend on nothing else."""
    table = rows.flatten_indices().data.table if rows._indices is not None else rows.data.table
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
        writer.write_table(table.replace_schema_metadata(None).combine_chunks())
    return hashlib.sha256(sink.getvalue()).digest()


def remembered_data(source: str) -> dict[str, Table]:
    """The splits that `remember_data` kept.

    Raises:
        FedeltaError: if this process was not given them.
    """
    if source not in _data:
        raise FedeltaError(f"data source {source} was in the memory of another process; pass the same data again")
    return _data[source]
