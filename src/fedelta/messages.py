"""The two messages of a round. Nothing else crosses between server and client.

A message is one safetensors blob: tensors under `A/…`, `B/…`, `head/…`, `patch/…`, everything else as JSON in
the blob's metadata. Bytes are counted from that blob, never estimated. Pickle is never read.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from fedelta.adapter import Adapter, LoraPair, Shapes, draw_A
from fedelta.errors import BadUpdate, FedeltaError
from fedelta.lowrank import LowRank
from fedelta.patch_log import Patch, PatchDelta

METADATA_KEY = "fedelta"


class ByteCount(NamedTuple):
    """Bytes of serialised messages by content; `overhead` is names, shapes and metadata."""

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
    sizes = {"A": 0, "B": 0, "head": 0, "patch": 0}
    for key, entry in _header(blob).items():
        if key != "__metadata__":
            begin, end = entry["data_offsets"]
            sizes[key.split("/", 1)[0]] += end - begin
    return ByteCount(sizes["A"] + sizes["B"], sizes["head"], sizes["patch"], len(blob) - sum(sizes.values()))


def pack(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """Tensors and JSON facts as one safetensors blob; equal content gives equal bytes."""
    contiguous = {key: tensors[key].detach().contiguous() for key in sorted(tensors)}
    return safetensors.torch.save(contiguous, metadata={METADATA_KEY: json.dumps(facts, sort_keys=True)})


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


def patch_tensors(entries: Mapping[int, Patch], total: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Base patches under `patch/…`, as messages and checkpoints hold them."""
    tensors = with_prefix("patch/total", total or {})
    for version, patch in entries.items():
        tensors |= with_prefix(f"patch/{version}/U", {module: product.U for module, product in patch.items()})
        tensors |= with_prefix(f"patch/{version}/V", {module: product.V for module, product in patch.items()})
    return tensors


def take_patches(
    versions: Iterable[int], tensors: dict[str, Tensor]
) -> tuple[dict[int, dict[str, LowRank]], dict[str, Tensor]]:
    """Take out what `patch_tensors` put in: the entries of these versions, and the dense sum (empty without one)."""
    entries = {}
    for version in versions:
        U, V = take_prefix(f"patch/{version}/U", tensors), take_prefix(f"patch/{version}/V", tensors)
        entries[version] = {module: LowRank(U[module], V[module]) for module in U}
    return entries, take_prefix("patch/total", tensors)


def _nothing_left(kind: str, tensors: Mapping[str, Tensor]) -> None:
    if tensors:
        raise FedeltaError(f"{kind} holds tensors that nothing reads: {', '.join(sorted(tensors)[:3])}")


@dataclass(frozen=True, eq=False)
class Broadcast:
    """Server to one client: where to start from and what to train.

    Args:
        client: its id.
        round: counted from 0.
        rank: r_i.
        scale: s_i, by which the client's LoRA layers multiply B·A.
        train: which factors the client trains, out of "A" and "B".
        A: module → (r_i, n). Empty when the client is to draw A from `seed_A`.
        B: module → (m, r_i), to be used with `scale`.
        seed_A: seed of `draw_A`, or None when A is in the message.
        heads: name → tensor, the trained modules outside LoRA.
        patch: what the client's base has not seen.
        wants_validation: whether the client is to report the loss on its own held-out part.
    """

    client: str
    round: int
    rank: int
    scale: float
    train: frozenset[str]
    A: Mapping[str, Tensor]
    B: Mapping[str, Tensor]
    heads: Mapping[str, Tensor]
    patch: PatchDelta
    seed_A: int | None = None
    wants_validation: bool = False

    def adapter(self, shapes: Shapes) -> Adapter:
        """The adapter that the client starts from, A drawn from the seed where it was not sent.

        Args:
            shapes: the client's own adapted layers.

        Raises:
            FedeltaError: if a module is missing, unknown or of another shape.
        """
        if set(self.B) != set(shapes):
            odd = sorted(set(self.B) ^ set(shapes))[0]
            raise FedeltaError(f"broadcast and model differ in adapted modules, first: {odd}")
        pairs = {}
        for module, (m, n) in shapes.items():
            A = draw_A(module, self.rank, n, self.seed_A) if self.seed_A is not None else self.A[module]
            pairs[module] = LoraPair(A, self.B[module], self.scale)
            if pairs[module].shape != (m, n) or pairs[module].rank != self.rank:
                raise FedeltaError(
                    f"module {module}: broadcast A {tuple(A.shape)}, B {tuple(self.B[module].shape)} "
                    f"does not fit a {m}×{n} layer at rank {self.rank}"
                )
        return Adapter(pairs)

    def to_bytes(self) -> bytes:
        tensors = with_prefix("A", self.A) | with_prefix("B", self.B) | with_prefix("head", self.heads)
        tensors |= patch_tensors(self.patch.entries, self.patch.total)
        facts = {name: getattr(self, name) for name in ("client", "round", "rank", "scale", "seed_A")}
        facts |= {"train": sorted(self.train), "wants_validation": self.wants_validation}
        facts["patch"] = {
            "start": self.patch.start,
            "end": self.patch.end,
            "digests": {str(v): digest for v, digest in self.patch.digests.items()},
            "dense": self.patch.total is not None,
        }
        return pack(tensors, facts)

    @classmethod
    def from_bytes(cls, blob: bytes) -> "Broadcast":
        tensors, facts = unpack(blob)
        log = facts.pop("patch")
        versions = [] if log["dense"] else range(log["start"] + 1, log["end"] + 1)
        entries, total = take_patches(versions, tensors)
        delta = PatchDelta(
            log["start"],
            log["end"],
            {int(v): digest for v, digest in log["digests"].items()},
            entries,
            total if log["dense"] else None,
        )
        facts["train"] = frozenset(facts["train"])
        A, B, heads = (take_prefix(prefix, tensors) for prefix in ("A", "B", "head"))
        _nothing_left("broadcast", tensors)
        return cls(A=A, B=B, heads=heads, patch=delta, **facts)


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """One client to the server: the factors it trained, and how it went.

    Args:
        client, round, rank, scale: as in the broadcast that it answers.
        version, digest: the base it trained on.
        examples: number of training examples, its weight.
        A: module → (r_i, n) as trained; empty if A was frozen.
        B: module → (m, r_i) as trained; empty if B was frozen.
        heads: name → tensor.
        metrics: e.g. `train_loss`, `validation_loss`.
    """

    client: str
    round: int
    rank: int
    scale: float
    version: int
    digest: str
    examples: int
    A: Mapping[str, Tensor]
    B: Mapping[str, Tensor]
    heads: Mapping[str, Tensor]
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        tensors = with_prefix("A", self.A) | with_prefix("B", self.B) | with_prefix("head", self.heads)
        names = ("client", "round", "rank", "scale", "version", "digest", "examples")
        return pack(tensors, {name: getattr(self, name) for name in names} | {"metrics": dict(self.metrics)})

    @classmethod
    def from_bytes(cls, blob: bytes, sender: str) -> "ClientUpdate":
        """Read an update.

        Raises:
            BadUpdate: naming the sender, if the blob is damaged or holds what an update does not.
        """
        try:
            tensors, facts = unpack(blob)
            A, B, heads = (take_prefix(prefix, tensors) for prefix in ("A", "B", "head"))
            _nothing_left("update", tensors)
            return cls(A=A, B=B, heads=heads, **facts)
        except (FedeltaError, TypeError) as error:
            raise BadUpdate(sender, str(error)) from error
