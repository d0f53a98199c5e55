"""The two messages of a round. Nothing else crosses between server and client.

A message is one safetensors blob: tensors under `A/…`, `B/…`, `core/…`, `tail/…`, `head/…`, `patch/…`, everything
else as JSON in the blob's metadata.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedelta.errors import BadUpdate, FedeltaError
from fedelta.lora.adapter import Adapter, LoraPair, Shapes, draw_A, draw_basis
from fedelta.lora.lowrank import LowRank
from fedelta.lora.patch_log import PatchDelta
from fedelta.protocol.compression import LOSSLESS, Precision, decode, encode, rounded
from fedelta.protocol.serialization import (
    nothing_left,
    pack,
    patch_tensors,
    products_to_tensors,
    take_patches,
    take_prefix,
    take_products,
    unpack,
    with_prefix,
)


class FactorPlan(NamedTuple):
    """Which factors of B·A cross in a round: out of "A", "B", and "core", the r×r matrix C of B = basis·C.

    Args:
        down: what the server sends; a missing A or basis is drawn from the seed, a missing B is zero.
        train: what a client trains.
        up: what it sends back.
        keep: what it keeps for its next round, and prefers to what `down` leaves out.
        prune: whether it may send a lower rank than it was given.
    """

    down: frozenset[str] = frozenset("AB")
    train: frozenset[str] = frozenset("AB")
    up: frozenset[str] = frozenset("AB")
    keep: frozenset[str] = frozenset()
    prune: bool = False

    def to_json(self) -> dict[str, Any]:
        return {key: value if isinstance(value, bool) else sorted(value) for key, value in self._asdict().items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "FactorPlan":
        sets = {key: frozenset(value) for key, value in data.items() if key != "prune"}
        return cls(**sets, prune=bool(data["prune"]))


def core_of(module: str, B: Tensor, seed: int) -> Tensor:
    """C (r, r) of a B = basis·C whose basis was drawn from this seed."""
    basis = draw_basis(module, B.shape[0], B.shape[1], seed)
    return (basis.T.double() @ B.double()).to(B.dtype)


def select_factors(adapter: Adapter, names: frozenset[str], seed: int) -> dict[str, dict[str, Tensor]]:
    """The named factors of an adapter, as a message holds them: name → module → tensor."""
    factors: dict[str, dict[str, Tensor]] = {name: {} for name in sorted(names)}
    for module, pair in adapter.items():
        for name, found in factors.items():
            found[module] = {"A": pair.A, "B": pair.B}[name] if name != "core" else core_of(module, pair.B, seed)
    return factors


@dataclass(frozen=True, eq=False)
class Broadcast:
    """Server to one client: where to start from and what to train.

    Args:
        client: its id.
        round: counted from 0.
        rank: r_i.
        scale: s_i, by which the client's LoRA layers multiply B·A.
        method: name and options, for what a method does at the client.
        wire: which factors are here, trained, sent back and kept.
        factors: "A" → module → (r_i, n), "B" → (m, r_i) to be used with `scale`, "core" → (r_i, r_i).
        seed: of whatever the client draws itself.
        heads: name → tensor, the trained modules outside LoRA.
        patch: what the client's base has not seen.
        tail: module → what is added to the base in this round only.
        indices: which rank indices of the global adapter these are; None is the first.
        wants_validation: whether the client is to report the loss on its own held-out part.
        precision: of factors, tail and heads in this message and its answer.
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
        """The adapter that the client starts from, with what it draws or keeps itself where nothing was sent.

        Args:
            shapes: the client's own adapted layers.
            kept: the adapter it ended its last round with, if it keeps factors.

        Raises:
            FedeltaError: if a module is missing, unknown or of another shape.
        """
        for name in self.plan.down:
            if set(self.factors[name]) != set(shapes):
                odd = sorted(set(self.factors[name]) ^ set(shapes))[0]
                raise FedeltaError(f"broadcast and model differ in adapted modules, first: {odd}")
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
            # A client that has been promoted since keeps what it has; its new columns are zero.
            B = kept[module].with_scale(self.scale).B[:, : self.rank]
            return torch.nn.functional.pad(B, (0, self.rank - B.shape[1]))
        return torch.zeros(m, self.rank)

    def as_received(self) -> "Broadcast":
        """The same with factors, tail and heads as they arrive: what a client does not send back is taken from here."""
        tensors = _factor_tensors(self.factors) | with_prefix("head", self.heads)
        tensors = rounded(tensors | products_to_tensors("tail", self.tail), self.precision)
        return replace(
            self,
            factors=_take_factors(self.factors, tensors),
            heads=take_prefix("head", tensors),
            tail=take_products("tail", tensors),  # type: ignore[arg-type]
        )

    def to_bytes(self) -> bytes:
        tensors = _factor_tensors(self.factors) | with_prefix("head", self.heads)
        tensors, changed = encode(tensors | products_to_tensors("tail", self.tail), self.precision)
        tensors |= patch_tensors(self.patch.entries, self.patch.total)
        names = ("client", "round", "rank", "scale", "method", "seed", "indices", "wants_validation", "precision")
        facts = {name: getattr(self, name) for name in names} | {"plan": self.plan.to_json(), "changed": changed}
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
        tensors = decode(tensors, facts.pop("changed"))
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
        plan = FactorPlan.from_json(facts.pop("plan"))
        indices = facts.pop("indices")
        message = cls(
            factors=_take_factors(plan.down, tensors),
            plan=plan,
            heads=take_prefix("head", tensors),
            tail=take_products("tail", tensors),  # type: ignore[arg-type]
            indices=None if indices is None else tuple(indices),
            patch=delta,
            **facts,
        )
        nothing_left("broadcast", tensors)
        return message


def _factor_tensors(factors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {key: tensor for name, found in factors.items() for key, tensor in with_prefix(name, found).items()}


def _take_factors(names: Iterable[str], tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {name: take_prefix(name, tensors) for name in sorted(names)}


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """One client to the server: the factors it trained, and how it went.

    Args:
        client, round, scale: as in the broadcast that it answers.
        rank: likewise, or lower if the client pruned itself.
        version, digest: the base it trained on.
        examples: number of training examples, its weight.
        factors: as trained: "A" → module → (r_i, n), "B" → (m, r_i), "core" → (r_i, r_i).
        heads: name → tensor.
        metrics: e.g. `train_loss`, `validation_loss`.
        precision: of factors and heads on their way.
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

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "ClientUpdate":
        """The same with other factors and heads."""
        left = dict(tensors)
        return replace(self, factors=_take_factors(self.factors, left), heads=take_prefix("head", left))

    def to_bytes(self) -> bytes:
        tensors, changed = encode(self.tensors, self.precision)
        names = ("client", "round", "rank", "scale", "version", "digest", "examples", "precision")
        facts = {name: getattr(self, name) for name in names} | {"changed": changed}
        return pack(tensors, facts | {"metrics": dict(self.metrics), "factors": sorted(self.factors)})

    @classmethod
    def from_bytes(cls, blob: bytes, sender: str) -> "ClientUpdate":
        """Read an update.

        Raises:
            BadUpdate: naming the sender, if the blob is damaged or holds what an update does not.
        """
        try:
            tensors, facts = unpack(blob)
            tensors = decode(tensors, facts.pop("changed"))
            factors = _take_factors(facts.pop("factors"), tensors)
            heads = take_prefix("head", tensors)
            nothing_left("update", tensors)
            return cls(factors=factors, heads=heads, **facts)
        except (FedeltaError, TypeError, KeyError, AttributeError) as error:
            raise BadUpdate(sender, str(error)) from error
