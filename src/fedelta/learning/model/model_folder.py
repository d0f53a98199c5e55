"""Checks of a model's folder before anything is built from it: its files are named, bounded, and fit together."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from fedelta.errors import FedeltaError, one_line

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 2**26
MAX_TOKENIZER_BYTES = 2**29
MAX_UNCHECKED_LAYERS = 1000
_LAYERS = {
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
    *("num_encoder_layers", "num_decoder_layers", "num_hidden_groups"),
}
_GIT_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Weights:
    """What a model's safetensors files hold, from their headers.

    Args:
        tensors: number of tensors.
        elements: number of elements of all tensors.
    """

    tensors: int
    elements: int


def check_folder(folder: Path) -> Weights:
    """Check the files of a model's folder, and count its weights.

    Raises:
        FedeltaError: naming the file that is missing, too large, not readable, or that contradicts another one.
    """
    config = read_json(folder / CONFIG)
    if (folder / "adapter_config.json").is_file():
        # transformers would load the adapter into the model without a word.
        raise FedeltaError(f"model {folder}: it also holds an adapter (adapter_config.json); expected a model alone")
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file() and tokenizer.stat().st_size > MAX_TOKENIZER_BYTES:
        raise FedeltaError(f"{tokenizer} has more than {MAX_TOKENIZER_BYTES >> 20} MB")
    weights = _count(folder)
    for key, layers in _layer_counts(config):
        # Building takes time in proportion to their number, so this is checked first.
        if not 0 <= layers <= max(weights.tensors, MAX_UNCHECKED_LAYERS):
            raise FedeltaError(
                f"model {folder}: config.json sets {key} to {layers}, but the weights are {weights.tensors} tensors"
            )
    # A byte of a quantized weight may hold several numbers.
    return Weights(weights.tensors, weights.elements * (8 if "quantization_config" in config else 1))


def read_json(file: Path) -> dict[str, Any]:
    """Read a file of a model's folder as a JSON object.

    Raises:
        FedeltaError: if it is missing, too large, or not a JSON object.
    """
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise FedeltaError(f"{file} has more than {MAX_JSON_BYTES >> 20} MB")
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FedeltaError(f"{file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FedeltaError(f"{file} is not JSON: {one_line(error)[:100]}") from error
    if not isinstance(content, dict):
        raise FedeltaError(f"{file} holds a {type(content).__name__}, expected a JSON object")
    return content


def _layer_counts(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, int]]:
    """Every number of layers that a configuration states, also in its nested sections."""
    for key, value in config.items():
        if isinstance(value, Mapping) and depth < 8:
            yield from _layer_counts(value, depth + 1)
        elif key in _LAYERS and isinstance(value, int):
            yield key, value


def _count(folder: Path) -> Weights:
    tensors = elements = 0
    for file in _weight_files(folder):
        try:
            with safetensors.safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    count = 1
                    for size in opened.get_slice(name).get_shape():
                        count *= size
                    tensors, elements = tensors + 1, elements + count
        except (OSError, safetensors.SafetensorError) as error:
            with file.open("rb") as stream:
                pointer = stream.read(len(_GIT_LFS)) == _GIT_LFS
            reason = "it is a Git LFS pointer, not weights: git lfs pull" if pointer else one_line(error)[:150]
            raise FedeltaError(f"{file}: {reason}") from error
    return Weights(tensors, elements)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, in the order in which transformers looks for them."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = next((file.name for file in sorted(folder.glob("*.bin"))), None)
        found = f"{pickled}, whose pickled weights can run code: convert them to" if pickled else "no weights, expected"
        raise FedeltaError(f"model {folder}: it holds {found} {WEIGHTS}")
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise FedeltaError(f"{folder / INDEX}: expected weight_map, from tensors to files")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise FedeltaError(
                f"{folder / INDEX} names {one_line(name)[:100]!r}, expected a safetensors file beside it"
            )
        if not (folder / name).is_file():
            raise FedeltaError(f"model {folder}: {name} is missing, one of {len(files)} files of its weights")
    return [folder / name for name in files]
