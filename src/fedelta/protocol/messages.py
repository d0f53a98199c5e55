"""The two messages of a round, `Broadcast` and `ClientUpdate`. Server and client exchange nothing else.

A message is one safetensors blob: tensors under `A/…`, `B/…`, `core/…`, `tail/…`, `head/…`, `patch/…`, and everything
else as JSON in the metadata of the blob.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pydantic.dataclasses
import torch
from pydantic import ConfigDict, ValidationError
from torch import Tensor

from fedelta.errors import BadBroadcast, BadUpdate, FedeltaError, in_one_line, one_line
from fedelta.lora.adapter import Adapter, LoraPair, Shapes, draw_A, draw_basis
from fedelta.lora.lowrank import LowRank
from fedelta.lora.patch_log import PatchDelta
from fedelta.protocol.broadcast_facts import read_facts
from fedelta.protocol.compression import LOSSLESS, Encoded, Precision, decode, encode, rounded
from fedelta.protocol.factor_plan import FactorPlan
from fedelta.protocol.serialization import (
    check_all_taken,
    check_floats,
    pack,
    patch_tensors,
    products_to_tensors,
    show,
    take_patches,
    take_prefix,
    take_products,
    unpack,
    with_prefix,
)
from fedelta.settings import first_error

_STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


@dataclass(frozen=True, eq=False)
class Broadcast:
    """Message from the server to one client: the start of its training and what to train.

    Args:
        client: id of the client.
        round: number of the round, from 0.
        rank: r_i.
        scale: s_i, by which the client's LoRA layers multiply B·A.
        method: name and options of the method, for its client-side steps.
        plan: which factors are sent, trained, sent back and kept.
        factors: "A" → module → (r_i, n); "B" → module → (m, r_i), at `scale`; "core" → module → (r_i, r_i).
        seed: seed of the factors that the client draws.
        heads: name → tensor, the trained modules outside LoRA.
        patch: base patches that the client has not seen.
        tail: module → matrix that is added to the base in this round only.
        indices: rank indices of the global adapter that the factors hold; None means the first r_i.
        wants_validation: True if the client must report the loss on its held-out examples.
        precision: precision of factors, tail and heads in this message and in the update.
    """

    client: str
    round: int
    rank: int
    scale: float
    method: Mapping[str, Any]
    plan: FactorPlan
    factors: Mapping[str, Mapping[str, Tensor]]
    seed: int
    heads: Mapping[str, Tensor]
    patch: PatchDelta
    tail: Mapping[str, LowRank] = field(default_factory=dict)
    indices: tuple[int, ...] | None = None
    wants_validation: bool = False
    precision: Precision = LOSSLESS

    def adapter(self, shapes: Shapes, kept: Adapter | None = None) -> Adapter:
        """Return the adapter that the client starts from. Factors that were not sent are drawn, zero, or kept.

        Args:
            shapes: module → (m, n) of the client's adapted layers.
            kept: the client's adapter at the end of its last round, if it keeps factors.

        Raises:
            FedeltaError: if a module is missing, unknown, or of another shape.
        """
        for name in self.plan.down:
            if set(self.factors[name]) != set(shapes):
                module = sorted(set(self.factors[name]) ^ set(shapes))[0]
                holder = "broadcast" if module in self.factors[name] else "model"
                raise FedeltaError(f"broadcast and model differ in adapted modules: only the {holder} has {module}")
        pairs = {}
        for module, (m, n) in shapes.items():
            A, B = self._A(module, n), self._B(module, m, kept)
            if A.shape != (self.rank, n) or B.shape != (m, self.rank):
                raise FedeltaError(
                    f"module {module}: broadcast A {tuple(A.shape)}, B {tuple(B.shape)} "
                    f"does not fit a {m}×{n} layer at rank {self.rank}"
                )
            pairs[module] = LoraPair(A, B, self.scale)
        return Adapter(pairs)

    def _A(self, module: str, n: int) -> Tensor:
        if "A" in self.plan.down:
            return self.factors["A"][module]
        return draw_A(module, self.rank, n, self.seed)

    def _B(self, module: str, m: int, kept: Adapter | None) -> Tensor:
        if "B" in self.plan.down:
            return self.factors["B"][module]
        if "core" in self.plan.down:
            return draw_basis(module, m, self.rank, self.seed) @ self.factors["core"][module]
        if kept is not None and "B" in self.plan.keep:
            # If the rank has been raised since, the kept columns stay and the new columns are zero.
            B = kept[module].with_scale(self.scale).B[:, : self.rank]
            return torch.nn.functional.pad(B, (0, self.rank - B.shape[1]))
        return torch.zeros(m, self.rank)

    def as_received(self) -> "Broadcast":
        """Return the broadcast as the client decodes it, which includes the factors that the client does not send."""
        tensors = _factor_tensors(self.factors) | with_prefix("head", self.heads)
        tensors = rounded(tensors | products_to_tensors("tail", self.tail), self.precision)
        return replace(
            self,
            factors=_take_factors(self.factors, tensors),
            heads=take_prefix("head", tensors),
            tail=take_products("tail", tensors),  # type: ignore[arg-type]
        )

    def to_bytes(self) -> bytes:
        """Serialize the broadcast."""
        tensors = _factor_tensors(self.factors) | with_prefix("head", self.heads)
        tensors, dtypes = encode(tensors | products_to_tensors("tail", self.tail), self.precision)
        tensors |= patch_tensors(self.patch.entries, self.patch.total)
        names = ("client", "round", "rank", "scale", "method", "seed", "indices", "wants_validation", "precision")
        facts = {name: getattr(self, name) for name in names} | {"plan": self.plan.to_json(), "changed": dtypes}
        facts["patch"] = {
            "start": self.patch.start,
            "end": self.patch.end,
            "digests": {str(v): digest for v, digest in self.patch.digests.items()},
            "dense": self.patch.total is not None,
        }
        return pack(tensors, facts)

    @classmethod
    def from_bytes(cls, blob: bytes) -> "Broadcast":
        """Read a broadcast.

        Raises:
            BadBroadcast: if the blob is damaged, or a fact or tensor is missing, unknown or invalid.
        """
        try:
            return cls._read(blob)
        except Exception as error:
            # A damaged blob may raise anything. A site reports it and waits for the next message.
            raise BadBroadcast(f"the server's broadcast can't be read: {in_one_line(error)}") from error

    @classmethod
    def _read(cls, blob: bytes) -> "Broadcast":
        tensors, raw = unpack(blob)
        facts = read_facts(raw)
        tensors = decode(tensors, facts.pop("changed"))
        patch, indices = facts.pop("patch"), facts.pop("indices")
        entries, total = take_patches([] if patch["dense"] else range(patch["start"] + 1, patch["end"] + 1), tensors)
        digests = {int(version): digest for version, digest in patch["digests"].items()}
        plan = FactorPlan.from_json(facts.pop("plan"))
        message = cls(
            factors=_take_factors(plan.down, tensors),
            plan=plan,
            heads=take_prefix("head", tensors),
            tail=take_products("tail", tensors),  # type: ignore[arg-type]
            indices=None if indices is None else tuple(indices),
            patch=PatchDelta(patch["start"], patch["end"], digests, entries, total if patch["dense"] else None),
            **facts,
        )
        check_all_taken("broadcast", tensors)
        return message

    def check(self, shapes: Shapes, kept: Adapter | None = None) -> Adapter:
        """Return `adapter(shapes, kept)`, after a check that patch and tail fit the model too.

        Raises:
            BadBroadcast: if they don't fit.
        """
        try:
            for patch in (*self.patch.entries.values(), self.patch.total or {}, self.tail):
                for module, matrix in patch.items():
                    found, expected = (tuple(matrix.shape), matrix.dtype), (shapes.get(module), torch.float32)
                    if found != expected:
                        raise FedeltaError(f"module {module}: the broadcast adds {found}, expected {expected}")
            return self.adapter(shapes, kept)
        except (FedeltaError, TypeError, KeyError) as error:
            raise BadBroadcast(f"the server's broadcast does not fit: {in_one_line(error)}") from error


def _factor_tensors(factors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {key: tensor for name, by_module in factors.items() for key, tensor in with_prefix(name, by_module).items()}


def _take_factors(names: Iterable[str], tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    factors = {name: take_prefix(name, tensors) for name in sorted(names)}
    for name, by_module in factors.items():
        check_floats(f"{name} of module", by_module)
    return factors


@pydantic.dataclasses.dataclass(frozen=True, eq=False, config=_STRICT)
class ClientUpdate:
    """Message from one client to the server: the trained factors and the metrics of the training.

    The types of all fields are validated, because an update may come from a client that is faulty or malicious.

    Args:
        client, round, scale: as in the broadcast that the update belongs to.
        rank: as in the broadcast, or lower if the client pruned its adapter.
        version, digest: version of the base that the client trained on, and its digest.
        examples: number of training rows, the client's weight.
        factors: trained factors: "A" → module → (r_i, n), "B" → module → (m, r_i), "core" → module → (r_i, r_i).
        heads: name → tensor, the trained modules outside LoRA.
        metrics: name → number, such as `train_loss` and `validation_loss`.
        precision: precision of factors and heads in the message.

    Raises:
        pydantic.ValidationError: if a field has another type.
    """

    client: str
    round: int
    rank: int
    scale: float
    version: int
    digest: str
    examples: int
    factors: Mapping[str, Mapping[str, Tensor]]
    heads: Mapping[str, Tensor]
    metrics: Mapping[str, float] = field(default_factory=dict)
    precision: Precision = LOSSLESS

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Factors and heads by their key in the message."""
        return _factor_tensors(self.factors) | with_prefix("head", self.heads)

    def to_bytes(self, encoded: Encoded | None = None) -> bytes:
        """Serialize the update.

        Args:
            encoded: tensors to send instead of the update's own, already encoded by `compensate`.
        """
        tensors, dtypes = encoded or encode(self.tensors, self.precision)
        names = ("client", "round", "rank", "scale", "version", "digest", "examples", "precision")
        facts = {name: getattr(self, name) for name in names} | {"changed": dtypes}
        return pack(tensors, facts | {"metrics": dict(self.metrics), "factors": sorted(self.factors)})

    @classmethod
    def from_bytes(cls, blob: bytes, sender: str) -> "ClientUpdate":
        """Read an update.

        Raises:
            BadUpdate: naming the sender, if the blob is damaged or a field or tensor is missing, unknown or invalid.
        """
        try:
            tensors, facts = unpack(blob)
            tensors = decode(tensors, facts.pop("changed"))
            factors = _take_factors(facts.pop("factors"), tensors)
            heads = take_prefix("head", tensors)
            check_all_taken("update", tensors)
            return cls(factors=factors, heads=heads, **facts)
        except ValidationError as error:
            name, expected, value = first_error(error)
            raise BadUpdate(
                sender, f"field {one_line(name, 80)} of its update: {expected}, found {show(value)}"
            ) from error
        except (FedeltaError, TypeError, KeyError, AttributeError) as error:
            raise BadUpdate(sender, str(error)) from error
