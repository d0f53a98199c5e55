"""Digests of what a run learns from: rows, a tokenizer, its chat template, and the files of a base model.

A digest is the SHA-256 of a canonical form in hexadecimal digits. It depends on the content alone: not on the path of a
file, on how rows are split into blocks in memory, or on the number of threads.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fedelta.errors import FedeltaError
from fedelta.learning.in_memory import PREFIX
from fedelta.learning.model.base_model import locate_model
from fedelta.reading import read_json

BLOCK_ROWS = 10_000
BLOCK_BYTES = 1 << 24
NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")
"""Keys of a model's `config.json` that say where it comes from, not what it computes."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files with weights, in the order in which transformers looks for them. An index names further files."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""Files of an adapter beside the weights, which transformers loads as well."""

FileState = tuple[str, int, int, int, int, int]
"""Real path, device, inode, size, and the times of the last change of content and of the entry, in nanoseconds.

The last one is set by the system at each write, rename and change of times, so a file that was replaced by one of the
same size and date has another state."""


def file_state(path: Path) -> FileState:
    """Describe a file so that any change of it gives another description, without reading it.

    Raises:
        OSError: if there is no such file.
    """
    stat = path.stat()
    return str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def folder_state(folder: Path) -> tuple[FileState, ...]:
    """Describe all files below a folder; a file describes itself, and a missing path is empty."""
    if folder.is_file():
        return (file_state(folder),)
    return tuple(file_state(path) for path in sorted(folder.rglob("*")) if path.is_file())


def rows_digest(rows: Any, columns: Iterable[str]) -> str:
    """Digest of these columns of a `datasets.Dataset`, row by row in their order."""
    names = sorted(set(columns) & set(rows.column_names))
    sha = hashlib.sha256(json.dumps(names).encode())
    for begin in range(0, rows.num_rows, BLOCK_ROWS):
        block = rows[begin : begin + BLOCK_ROWS]
        values = list(zip(*(block[name] for name in names), strict=True))
        sha.update(_canonical(values))
    return sha.hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer without its chat template: vocabulary, special tokens, and how it splits texts."""
    sha = hashlib.sha256()
    added = {str(i): repr(token) for i, token in tokenizer.added_tokens_decoder.items()}
    for part in (tokenizer.get_vocab(), tokenizer.special_tokens_map, added, tokenizer.model_max_length):
        sha.update(_canonical(part))
    if getattr(tokenizer, "is_fast", False):
        # Truncation and padding are not part of a tokenizer: each call sets them.
        steps = json.loads(tokenizer.backend_tokenizer.to_str())
        sha.update(_canonical({key: value for key, value in steps.items() if key not in ("truncation", "padding")}))
    else:
        # A slow tokenizer has its rules in files, such as a SentencePiece model.
        for name in sorted(tokenizer.vocab_files_names):
            file = getattr(tokenizer, name, None)
            if isinstance(file, str) and Path(file).is_file():
                sha.update(_file_digest(file_state(Path(file))).encode())
    return sha.hexdigest()


def template_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer's chat template, or of its templates by name; also of the fact that it has none."""
    return hashlib.sha256(_canonical(getattr(tokenizer, "chat_template", None))).hexdigest()


def model_digest(model: Any) -> str:
    """Digest of a loaded model: its tensors to the last bit, and the settings of its configuration."""
    tensors = {name: tensor for name, tensor in sorted(model.state_dict().items()) if isinstance(tensor, torch.Tensor)}
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in NOT_OF_THE_MODEL}
    shapes = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_tensor_digest, tensors.values()))
    return hashlib.sha256(_canonical([config, shapes, digests])).hexdigest()


def _tensor_digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest() if flat.numel() else ""


def base_digests(name: str) -> dict[str, str]:
    """Digests of the weights and of the configuration of a base model.

    The bytes of all files that transformers would read are hashed. In one process a file is read once, and again as
    soon as the system reports any change of it.

    Args:
        name: `model.name` of a configuration.

    Returns:
        `weights` and `configuration`; for a model in memory only `weights`. Empty if the files are not on this machine.
    """
    if name.startswith(PREFIX):
        # The name is made of a digest of the weights.
        return {"weights": hashlib.sha256(name.encode()).hexdigest()}
    files = _model_files(name)
    if "config.json" not in files:
        return {}
    config = read_json(files.pop("config.json"))
    if isinstance(config, dict):
        config = {key: value for key, value in config.items() if key not in NOT_OF_THE_MODEL}
    states = {file: file_state(path) for file, path in sorted(files.items())}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # Hashing releases Python's lock, so the files of a large model are read in parallel.
        digests = list(pool.map(_file_digest, states.values()))
    weights = hashlib.sha256(_canonical(list(zip(states, digests, strict=True))))
    return {"weights": weights.hexdigest(), "configuration": hashlib.sha256(_canonical(config)).hexdigest()}


def _model_files(name: str) -> dict[str, Path]:
    """File name → path of the configuration and the weights of a model, as far as they are on this machine."""
    found = {}
    for file in ("config.json", *ADAPTER_FILES):
        if path := _local_file(name, file):
            found[file] = path
    for file in WEIGHTS:
        if path := _local_file(name, file):
            found[file] = path
            parts = read_json(path).get("weight_map", {}).values() if file.endswith(".index.json") else ()
            for part in set(parts):
                if shard := _local_file(name, str(part)):
                    found[str(part)] = shard
            break
    return found


def _local_file(name: str, file: str) -> Path | None:
    """Find a file of a model in its folder or in the cache of the hub; None if it is not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    place = locate_model(name)
    if Path(place).is_dir():
        path = Path(place) / file
        return path if path.is_file() else None
    cached = try_to_load_from_cache(place, file)
    return Path(cached) if isinstance(cached, str) else None


@functools.lru_cache(maxsize=1024)
def _file_digest(state: FileState) -> str:
    """Digest of a file's bytes; the cache's key is its state."""
    sha = hashlib.sha256()
    path = Path(state[0])
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                sha.update(block)
    except OSError as error:
        raise FedeltaError(f"{path}: {error.strerror or error}") from error
    return sha.hexdigest()
