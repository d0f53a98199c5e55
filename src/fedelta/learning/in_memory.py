"""Data and models that the calling program has loaded already.

A configuration is plain data that a run writes down, so it cannot hold objects. They are kept here, under a name made
of a digest of their content, and a configuration refers to that name. A run can therefore only be resumed with the
same data and the same weights.
"""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from fedelta.errors import FedeltaError

PREFIX = "memory:"
_data: dict[str, dict[str, Any]] = {}
_models: dict[str, tuple[Any, Any]] = {}


def remember_data(data: Any) -> str:
    """Keep data for the runs of this process.

    Args:
        data: a `datasets.Dataset` or a list of dicts (training rows alone; validation and test are drawn from them), or
            a mapping of split names to either.

    Returns:
        The name under which `data.source` refers to it.

    Raises:
        FedeltaError: if it is none of these, or has no rows.
    """
    from datasets import Dataset

    splits: dict[str, Any] = dict(data) if isinstance(data, Mapping) else {"train": data}
    sha = hashlib.sha256()
    for name, rows in splits.items():
        if isinstance(rows, Sequence) and rows and all(isinstance(row, Mapping) for row in rows):
            splits[name] = Dataset.from_list([dict(row) for row in rows])
        elif not isinstance(rows, Dataset) or rows.num_rows == 0:
            raise FedeltaError(
                f"data: split {name} is a {type(rows).__name__}, "
                "expected a datasets.Dataset or a list of dicts, with rows"
            )
        sha.update(name.encode())
        sha.update(_content(splits[name]))
    source = f"{PREFIX}{sha.hexdigest()[:16]}"
    _data[source] = splits
    return source


def _content(rows: Any) -> bytes:
    """The rows in order, as bytes that depend on nothing else."""
    table = rows.flatten_indices().data.table if rows._indices is not None else rows.data.table
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
        writer.write_table(table.replace_schema_metadata(None).combine_chunks())
    return hashlib.sha256(sink.getvalue()).digest()


def remember_model(model: Any, tokenizer: Any, digest: str) -> str:
    """Keep a loaded model and its tokenizer for the runs of this process.

    Args:
        model: a transformers model that classifies, or a causal language model. Runs train copies of it.
        tokenizer: its tokenizer.
        digest: digest of the model's weights.

    Returns:
        The name under which `model.name` refers to it.
    """
    sha = hashlib.sha256(digest.encode())
    for part in (tokenizer.get_vocab(), tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None)):
        sha.update(json.dumps(part, sort_keys=True, default=str).encode())
    if getattr(tokenizer, "is_fast", False):
        sha.update(tokenizer.backend_tokenizer.to_str().encode())
    name = f"{PREFIX}{sha.hexdigest()[:16]}"
    _models[name] = model, tokenizer
    return name


def remembered_data(source: str) -> dict[str, Any]:
    """The splits that `remember_data` kept.

    Raises:
        FedeltaError: if this process was not given them.
    """
    if source not in _data:
        raise FedeltaError(f"data source {source} was in the memory of another process; pass the same data again")
    return _data[source]


def remembered_model(name: str) -> Any:
    """A copy of the model that `remember_model` kept.

    Raises:
        FedeltaError: if this process was not given it.
    """
    return copy.deepcopy(_entry(name)[0])


def remembered_config(name: str) -> Any:
    """The configuration of that model."""
    return _entry(name)[0].config


def remembered_tokenizer(name: str) -> Any:
    """A copy of the tokenizer that `remember_model` kept."""
    return copy.deepcopy(_entry(name)[1])


def _entry(name: str) -> tuple[Any, Any]:
    if name not in _models:
        raise FedeltaError(f"model {name} was in the memory of another process; pass the same model again")
    return _models[name]
