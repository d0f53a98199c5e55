"""Serialization of tensors and JSON facts as one safetensors blob, the format of messages and checkpoints.

Byte counts are read from the blob, not estimated. Pickle is never read.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from fedelta.errors import FedeltaError, listed, one_line
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.lowrank import Product, from_tensors
from fedelta.lora.patch_log import Patch
from fedelta.protocol.compression import Basis, ErrorFeedback

METADATA_KEY = "fedelta"
"""Key of the JSON facts in the metadata of a blob."""


class ByteCount(NamedTuple):
    """Number of bytes of serialized messages by content.

    Args:
        adapter: factors and tails.
        heads: trained modules outside LoRA.
        patch: base patches.
        overhead: names, shapes, scales and metadata.
    """

    adapter: int = 0
    heads: int = 0
    patch: int = 0
    overhead: int = 0

    @property
    def total(self) -> int:
        """Sum of all fields."""
        return sum(self)

    def plus(self, other: "ByteCount") -> "ByteCount":
        """Return the field-wise sum of two counts."""
        return ByteCount(*(a + b for a, b in zip(self, other, strict=True)))


def _header(blob: bytes) -> dict[str, Any]:
    """Return the JSON header of a safetensors blob: tensor name → dtype, shape and offsets."""
    length = int.from_bytes(blob[:8], "little")
    if len(blob) < 8 or length > len(blob) - 8:
        raise FedeltaError(f"truncated message: it has {len(blob)} bytes, but its header alone claims {length}")
    try:
        header = json.loads(blob[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise FedeltaError("damaged message: its header is not JSON") from error
    if not isinstance(header, dict):
        raise FedeltaError(f"damaged message: its header is a {type(header).__name__}, expected names and shapes")
    return header


def count_bytes(blob: bytes) -> ByteCount:
    """Count the bytes of a message by content, from its header."""
    sizes = dict.fromkeys(("A", "B", "core", "tail", "head", "patch"), 0)
    for key, entry in _header(blob).items():
        if key != "__metadata__":
            begin, end = entry["data_offsets"]
            kind = key.split("/", 1)[0]
            if kind in sizes:
                sizes[kind] += end - begin
    adapter = sum(sizes[key] for key in ("A", "B", "core", "tail"))
    return ByteCount(adapter, sizes["head"], sizes["patch"], len(blob) - sum(sizes.values()))


def pack(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """Serialize tensors and JSON facts as one safetensors blob. Equal content gives equal bytes."""
    # safetensors refuses tensors that share storage, and a method may send the same mean as a factor and in a tail.
    separate, storages = {}, set[int]()
    for key in sorted(tensors):
        tensor = tensors[key].detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[key] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return safetensors.torch.save(separate, metadata={METADATA_KEY: json.dumps(facts, sort_keys=True)})


def unpack(blob: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and facts of a blob.

    Raises:
        FedeltaError: if the blob is truncated, damaged, or was not written by fedelta.
    """
    metadata = _header(blob).get("__metadata__")
    if not isinstance(metadata, dict) or not isinstance(metadata.get(METADATA_KEY), str):
        raise FedeltaError("not a fedelta message: its metadata lacks the key 'fedelta'")
    try:
        tensors, facts = safetensors.torch.load(blob), json.loads(metadata[METADATA_KEY])
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise FedeltaError(f"damaged message: {one_line(error)}") from error
    except RecursionError as error:
        raise FedeltaError("damaged message: its facts are nested too deeply") from error
    if not isinstance(facts, dict):
        raise FedeltaError(f"damaged message: its facts are a {type(facts).__name__}, expected an object")
    return tensors, facts


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with `prefix/` in front of their names."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def take_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove every tensor under `prefix/` and return them by the rest of their names.

    A reader takes all tensors that it knows; `check_all_taken` then refuses the rest.
    """
    return {key.removeprefix(f"{prefix}/"): tensors.pop(key) for key in list(tensors) if key.startswith(f"{prefix}/")}


def adapter_tensors(prefix: str, adapter: Adapter) -> dict[str, Tensor]:
    """Return the factors of an adapter under `prefix` + `A/…` and `prefix` + `B/…`."""
    A, B = ({module: getattr(pair, factor) for module, pair in adapter.items()} for factor in "AB")
    return with_prefix(f"{prefix}A", A) | with_prefix(f"{prefix}B", B)


def take_adapter(prefix: str, scale: float, tensors: dict[str, Tensor]) -> Adapter:
    """Remove and return the adapter that `adapter_tensors` wrote."""
    A, B = take_prefix(f"{prefix}A", tensors), take_prefix(f"{prefix}B", tensors)
    return Adapter({module: LoraPair(A[module], B[module], scale) for module in A})


def products_to_tensors(prefix: str, products: Mapping[str, Product]) -> dict[str, Tensor]:
    """Return matrices in either form as tensors `prefix/module/part`."""
    return {
        f"{prefix}/{module}/{part}": tensor
        for module, product in products.items()
        for part, tensor in product.tensors.items()
    }


def take_products(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Product]:
    """Remove and return the matrices that `products_to_tensors` wrote."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in take_prefix(prefix, tensors).items():
        module, part = name.rsplit("/", 1)
        parts[module][part] = tensor
    return {module: from_tensors(by_part) for module, by_part in parts.items()}


def patch_tensors(entries: Mapping[int, Patch], total: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return base patches as tensors under `patch/…`, for messages and checkpoints."""
    tensors = with_prefix("patch/total", total or {})
    for version, patch in entries.items():
        tensors |= products_to_tensors(f"patch/{version}", patch)
    return tensors


def take_patches(
    versions: Iterable[int], tensors: dict[str, Tensor]
) -> tuple[dict[int, dict[str, Product]], dict[str, Tensor]]:
    """Remove and return what `patch_tensors` wrote.

    Returns:
        Version → patch, for the given versions, and the dense sum by module (empty if there is none).
    """
    entries = {}
    for version in versions:
        entries[version] = take_products(f"patch/{version}", tensors)
    return entries, take_prefix("patch/total", tensors)


def error_feedback_tensors(prefix: str, feedback: ErrorFeedback) -> dict[str, Tensor]:
    """Return the tensors of an error feedback under `prefix/before/…` and `prefix/after/…`."""
    return with_prefix(f"{prefix}/before", feedback.before) | with_prefix(f"{prefix}/after", feedback.after)


def take_error_feedback(prefix: str, facts: Mapping[str, Any], tensors: dict[str, Tensor]) -> ErrorFeedback:
    """Remove and return the error feedback that `error_feedback_tensors` wrote.

    Args:
        prefix: as given to `error_feedback_tensors`.
        facts: `ErrorFeedback.facts`.
        tensors: tensors to take from.
    """
    before, after = (take_prefix(f"{prefix}/{part}", tensors) for part in ("before", "after"))
    return ErrorFeedback(facts["round"], Basis(*facts["basis"]), before, after)


def check_all_taken(kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise if a message has tensors that its reader did not take."""
    if tensors:
        raise FedeltaError(f"{kind} has unexpected tensors: {listed(sorted(tensors), 3)}")


def show(value: object, limit: int = 20) -> str:
    """Return a value as at most `limit` characters, so that a client can't fill the log with a huge number or text."""
    try:
        return repr(value)[:limit]
    except ValueError:
        return f"a {type(value).__name__} that is too long to print"
