"""Tensors of an adapter folder: one safetensors file, or shards with an index. Headers are checked before any data."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.lora.files.locate import INDEX, PICKLE, WEIGHTS

MAX_TENSORS = 200_000
_SHARD = re.compile(r"adapter_model-(\d{5})-of-(\d{5})\.safetensors")


class Entry(NamedTuple):
    """A tensor in a file.

    Args:
        file: name of the file in the folder.
        key: name of the tensor in the file.
        shape: its shape.
        dtype: its dtype, as safetensors spells it.
    """

    file: str
    key: str
    shape: tuple[int, ...]
    dtype: str


class OpenWeights:
    """Read access to the tensors of a folder. A file is opened when its first tensor is read."""

    def __init__(self, folder: Path, name: str, files: ExitStack) -> None:
        self._folder = folder
        self._name = name
        self._files = files
        self._opened: dict[str, Any] = {}

    def read(self, entry: Entry) -> Tensor:
        """Read one tensor."""
        return self._file(entry.file).get_tensor(entry.key)

    def entries(self, file: str) -> dict[str, Entry]:
        """Read the header of one file."""
        tensors = self._file(file)
        result = {}
        keys = list(tensors.keys())
        if len(keys) > MAX_TENSORS:
            raise FedeltaError(f"{self._name}: {file} has {len(keys)} tensors, expected at most {MAX_TENSORS}")
        for key in keys:
            header = tensors.get_slice(key)
            result[key] = Entry(file, key, tuple(header.get_shape()), header.get_dtype())
        return result

    def _file(self, file: str) -> Any:
        if file not in self._opened:
            self._opened[file] = self._files.enter_context(safetensors.safe_open(self._folder / file, framework="pt"))
        return self._opened[file]


@contextmanager
def opened(folder: Path, name: str) -> Iterator[OpenWeights]:
    """Open the weights of a folder; errors of the library become a `FedeltaError`."""
    try:
        with ExitStack() as files:
            yield OpenWeights(folder, name, files)
    except (safetensors.SafetensorError, OSError, RuntimeError, MemoryError) as error:  # the latter of a failing mmap
        raise FedeltaError(f"{name}: {WEIGHTS}: {' '.join(str(error).split())[:120]}") from error


def read_entries(folder: Path, name: str) -> dict[str, Entry]:
    """Read the headers of all weight files of a folder.

    Raises:
        FedeltaError: naming what is missing, damaged, or there instead.
    """
    files = _weight_files(folder, name)
    entries: dict[str, Entry] = {}
    with opened(folder, name) as weights:
        for file in files:
            _check_start(folder / file, name)
            for key, entry in weights.entries(file).items():
                if key in entries:
                    raise FedeltaError(f"{name}: tensor {key[:80]} is in {entries[key].file} and in {file}")
                entries[key] = entry
    return entries


def _weight_files(folder: Path, name: str) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    present = {each.name for each in folder.iterdir()}
    shards = sorted(each for each in present if _SHARD.fullmatch(each))
    if INDEX in present:
        shards = sorted(set(_shards_of_index(folder, name).values()))
    elif shards:
        total = int(_SHARD.fullmatch(shards[0]).group(2))  # type: ignore[union-attr]
        if len(shards) != total:
            raise FedeltaError(f"{name}: {len(shards)} of {total} shards of {WEIGHTS}, expected all of them")
    if shards:
        if missing := [shard for shard in shards if shard not in present]:
            raise FedeltaError(f"{name}: {INDEX} names {missing[0]}, which is missing")
        return shards
    if PICKLE in present:
        raise FedeltaError(
            f"{name}: {PICKLE} is a pickle, which can run code and is never loaded; open it with PEFT if "
            "you trust it and save it again: model.save_pretrained(folder, safe_serialization=True)"
        )
    raise FedeltaError(f"{name}: no {WEIGHTS}")


def _shards_of_index(folder: Path, name: str) -> Mapping[str, str]:
    try:
        shards = json.loads((folder / INDEX).read_bytes())["weight_map"]
        valid = isinstance(shards, dict) and all(_SHARD.fullmatch(str(file)) for file in shards.values())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FedeltaError(f"{name}: {INDEX} is not an index of shards") from error
    if not valid:
        raise FedeltaError(
            f"{name}: {INDEX} is not an index of shards such as adapter_model-00001-of-00002.safetensors"
        )
    return shards


def _check_start(file: Path, name: str) -> None:
    """Raise if a file is something other than safetensors that its first bytes tell."""
    with file.open("rb") as stream:
        start = stream.read(32)
    if start.startswith(b"version https://git-lfs"):
        raise FedeltaError(f"{name}: {file.name} is a pointer of Git LFS, not the file itself; run `git lfs pull`")
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise FedeltaError(f"{name}: {file.name} is a pickle, which can run code and is never loaded")
    if not start:
        raise FedeltaError(f"{name}: {file.name} is empty")
