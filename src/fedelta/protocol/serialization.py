"""Serialization of tensors and JSON facts as one safetensors blob, the format of messages and checkpoints.

Byte counts are read from the blob, not estimated. Pickle is never read.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fedelta.errors import FedeltaError, listed
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.lowrank import Product, from_tensors
from fedelta.lora.patch_log import Patch
from fedelta.protocol.compression import Basis, ErrorFeedback
from fedelta.reading import parse_json

METADATA_KEY = "fedelta"
"""Key of the JSON facts in the metadata of a blob."""
SEAL = "sha256"
"""Key of the digest in the facts of a sealed blob."""
_NO_DIGEST = "0" * 64
"""What stands in place of the digest while the digest is computed."""
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WHOLE = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)


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
    header = parse_json(blob[8 : 8 + length], "damaged message: its header")
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
        FedeltaError: if the blob is truncated, damaged, has tensors of a dtype that fedelta does not use, or was not
            written by fedelta.
    """
    facts = _facts(blob)
    try:
        tensors = safetensors.torch.load(blob)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise FedeltaError(f"damaged message: {str(error)[:150]}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in (*FLOATS, *WHOLE):
            raise FedeltaError(f"tensor {name[:80]!r} has the dtype {tensor.dtype}, expected float32 or a similar one")
    return tensors, facts


def _facts(blob: bytes) -> dict[str, Any]:
    metadata = _header(blob).get("__metadata__")
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise FedeltaError("not a fedelta message: its metadata lacks the key 'fedelta'")
    # A client whose training diverged reports a loss that is not finite, which the validation names.
    facts = parse_json(text, "damaged message: its metadata", finite=False)
    if not isinstance(facts, dict):
        raise FedeltaError(f"damaged message: its metadata is a {type(facts).__name__}, expected keys and values")
    return facts


def pack_sealed(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """Serialize like `pack`, with a digest of the whole blob inside: for files that a later process must trust."""
    blob = bytearray(pack(tensors, {**facts, SEAL: _NO_DIGEST}))
    begin = _place_of_digest(blob)
    blob[begin : begin + len(_NO_DIGEST)] = hashlib.sha256(blob).hexdigest().encode()
    return bytes(blob)


def unpack_sealed(blob: bytes, required: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and facts of a blob that `pack_sealed` wrote.

    Args:
        blob: the blob.
        required: refuse a blob without a digest, as earlier versions wrote it.

    Raises:
        FedeltaError: if any bit of the blob has changed. If no digest is required, the caller checks that the facts
            have one (`SEAL`) where there must be one.
    """
    digest = _facts(blob).get(SEAL)
    if digest is not None:
        begin = _place_of_digest(blob)
        content = memoryview(blob)
        sha = hashlib.sha256(content[:begin])
        sha.update(_NO_DIGEST.encode())
        sha.update(content[begin + len(_NO_DIGEST) :])
        if sha.hexdigest() != digest:
            raise FedeltaError("damaged: its content does not have the digest that was written with it")
    elif required:
        raise FedeltaError("damaged: it has no digest")
    return unpack(blob)


def _place_of_digest(blob: bytes | bytearray) -> int:
    """Index of the first character of the digest. The facts are JSON inside of JSON, so quotes are escaped once."""
    key = f'\\"{SEAL}\\": \\"'.encode()
    begin = blob.find(key, 0, 8 + int.from_bytes(blob[:8], "little"))
    if begin < 0:
        raise FedeltaError("damaged: it has no digest")
    return begin + len(key)


def check_floats(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise a FedeltaError if a tensor does not hold floating-point numbers."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise FedeltaError(f"{what} {name[:80]!r} is {tensor.dtype}, expected float32")


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
    check_floats("A of module", A)
    check_floats("B of module", B)
    if set(A) != set(B):
        raise FedeltaError(f"module {min(set(A) ^ set(B))[:80]!r} has only one of A and B")
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
    taken = take_prefix(prefix, tensors)
    check_floats("matrix", taken)
    for name, tensor in taken.items():
        module, _, part = name.rpartition("/")
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
