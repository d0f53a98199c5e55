"""Tensors and JSON facts as one safetensors blob: what messages and checkpoints are made of.

Bytes are counted from the blob, never estimated. Pickle is never read.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.lowrank import Product, from_tensors
from fedelta.lora.patch_log import Patch
from fedelta.protocol.compression import Basis, ErrorFeedback

METADATA_KEY = "fedelta"


class ByteCount(NamedTuple):
    """Bytes of serialized messages by content; `overhead` is names, shapes and metadata."""

    adapter: int = 0
    heads: int = 0
    patch: int = 0
    overhead: int = 0

    @property
    def total(self) -> int:
        return sum(self)

    def plus(self, other: "ByteCount") -> "ByteCount":
        return ByteCount(*(a + b for a, b in zip(self, other, strict=True)))


def _header(blob: bytes) -> dict[str, Any]:
    length = int.from_bytes(blob[:8], "little")
    if len(blob) < 8 or length > len(blob) - 8:
        raise FedeltaError(f"truncated message: {len(blob)} bytes, its header alone claims {length}")
    try:
        header = json.loads(blob[8 : 8 + length])
    except ValueError as error:
        raise FedeltaError("damaged message: its header is not JSON") from error
    if not isinstance(header, dict):
        raise FedeltaError(f"damaged message: its header is a {type(header).__name__}, expected names and shapes")
    return header


def count_bytes(blob: bytes) -> ByteCount:
    """Bytes of a message by content, read from its own header."""
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
    """Tensors and JSON facts as one safetensors blob; equal content gives equal bytes."""
    # safetensors refuses tensors of one storage; a method may well send the mean both as a factor and in a tail.
    apart, storages = {}, set[int]()
    for key in sorted(tensors):
        tensor = tensors[key].detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        apart[key] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return safetensors.torch.save(apart, metadata={METADATA_KEY: json.dumps(facts, sort_keys=True)})


def unpack(blob: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts of a blob.

    Raises:
        FedeltaError: if the blob is truncated or is not one of ours.
    """
    metadata = _header(blob).get("__metadata__") or {}
    if METADATA_KEY not in metadata:
        raise FedeltaError("not a fedelta message: its metadata lacks the key 'fedelta'")
    try:
        return safetensors.torch.load(blob), json.loads(metadata[METADATA_KEY])
    except (safetensors.SafetensorError, ValueError) as error:
        raise FedeltaError(f"damaged message: {error}") from error


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def take_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take out, and remove, every tensor under a prefix; what nobody takes is an error in the end."""
    return {key.removeprefix(f"{prefix}/"): tensors.pop(key) for key in list(tensors) if key.startswith(f"{prefix}/")}


def adapter_tensors(prefix: str, adapter: Adapter) -> dict[str, Tensor]:
    """The factors under `prefix` + `A/…` and `B/…`."""
    A, B = ({module: getattr(pair, factor) for module, pair in adapter.items()} for factor in "AB")
    return with_prefix(f"{prefix}A", A) | with_prefix(f"{prefix}B", B)


def take_adapter(prefix: str, scale: float, tensors: dict[str, Tensor]) -> Adapter:
    """Take out what `adapter_tensors` put in."""
    A, B = take_prefix(f"{prefix}A", tensors), take_prefix(f"{prefix}B", tensors)
    return Adapter({module: LoraPair(A[module], B[module], scale) for module in A})


def products_to_tensors(prefix: str, products: Mapping[str, Product]) -> dict[str, Tensor]:
    """Matrices by module as tensors `prefix/module/part`, in factors or dense."""
    return {
        f"{prefix}/{module}/{part}": tensor
        for module, product in products.items()
        for part, tensor in product.tensors.items()
    }


def take_products(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Product]:
    """Take out what `products_to_tensors` put in."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in take_prefix(prefix, tensors).items():
        module, part = name.rsplit("/", 1)
        parts[module][part] = tensor
    return {module: from_tensors(found) for module, found in parts.items()}


def patch_tensors(entries: Mapping[int, Patch], total: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Base patches under `patch/…`, as messages and checkpoints hold them."""
    tensors = with_prefix("patch/total", total or {})
    for version, patch in entries.items():
        tensors |= products_to_tensors(f"patch/{version}", patch)
    return tensors


def take_patches(
    versions: Iterable[int], tensors: dict[str, Tensor]
) -> tuple[dict[int, dict[str, Product]], dict[str, Tensor]]:
    """Take out what `patch_tensors` put in: the entries of these versions, and the dense sum (empty without one)."""
    entries = {}
    for version in versions:
        entries[version] = take_products(f"patch/{version}", tensors)
    return entries, take_prefix("patch/total", tensors)


def error_feedback_tensors(prefix: str, feedback: ErrorFeedback) -> dict[str, Tensor]:
    """What a client's message has left out, under `prefix/before/…` and `prefix/after/…`."""
    return with_prefix(f"{prefix}/before", feedback.before) | with_prefix(f"{prefix}/after", feedback.after)


def take_error_feedback(prefix: str, facts: Mapping[str, Any], tensors: dict[str, Tensor]) -> ErrorFeedback:
    """Take out what `error_feedback_tensors` put in."""
    before, after = (take_prefix(f"{prefix}/{part}", tensors) for part in ("before", "after"))
    return ErrorFeedback(facts["round"], Basis(*facts["basis"]), before, after)


def nothing_left(kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what nobody took: a message is read whole, or not at all."""
    if tensors:
        raise FedeltaError(f"{kind} holds tensors that nothing reads: {', '.join(sorted(tensors)[:3])}")
