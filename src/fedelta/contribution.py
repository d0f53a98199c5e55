"""The door: an update is checked against the broadcast that it answers, once, and never again inside."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedelta.adapter import Adapter, LoraPair, Shapes
from fedelta.errors import BadUpdate
from fedelta.messages import Broadcast, ClientUpdate

MOST_EXAMPLES = 10**12
"""A client that claims more would drown all others by a slip or by intent."""


@dataclass(frozen=True, eq=False)
class Contribution:
    """An update that has passed the door, complete with the factors that were frozen.

    Args:
        client: its id.
        weight: w_i, not normalised.
        adapter: s_i·B_i·A_i of every module.
        heads: name → tensor.
        metrics: finite numbers by name.
    """

    client: str
    weight: float
    adapter: Adapter
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def _finite(tensor: Tensor) -> bool:
    # A sum is seven times as fast as a mask and finite only if every term is (or on overflow: then look).
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def receive(update: ClientUpdate, sent: Broadcast, shapes: Shapes, weight: float | None = None) -> Contribution:
    """Check an update against the broadcast that it answers. The door: nothing is checked again inside.

    Args:
        update: what the client sent.
        sent: what it was sent.
        shapes: module → (m, n) of the adapted layers.
        weight: w_i; None takes the number of examples.

    Raises:
        BadUpdate: naming the client, what was found and what was expected.
    """

    def refuse(reason: str) -> BadUpdate:
        return BadUpdate(sent.client, reason)

    for name in ("client", "round", "rank", "scale"):
        found, expected = getattr(update, name), getattr(sent, name)
        if found != expected:
            raise refuse(f"its update says {name} {found}, expected {expected}")
    if (update.version, update.digest) != (sent.patch.end, sent.patch.digests[sent.patch.end]):
        raise refuse(f"it trained on base version {update.version}, expected {sent.patch.end}")
    if type(update.examples) is not int or not 1 <= update.examples <= MOST_EXAMPLES:
        raise refuse(f"it reports {str(update.examples)[:20]} training examples, expected 1 to {MOST_EXAMPLES}")
    for name, value in update.metrics.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise refuse(f"it reports {name} {value!r}, expected a finite number")
    start = sent.adapter(shapes)
    factors: dict[str, dict[str, Tensor]] = {}
    for factor, found in (("A", update.A), ("B", update.B)):
        wanted = {module: getattr(pair, factor) for module, pair in start.items()}
        if factor in sent.train:
            _same_tensors(found, wanted, f"{factor} of module", refuse)
        elif found:
            raise refuse(f"it sent {factor}, which was frozen in this round")
        factors[factor] = dict(found) or wanted
    _same_tensors(update.heads, sent.heads, "head", refuse)
    pairs = {m: LoraPair(factors["A"][m], factors["B"][m], sent.scale) for m in shapes}
    w = update.examples if weight is None else weight
    return Contribution(sent.client, w, Adapter(pairs), update.heads, update.metrics)


def _same_tensors(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str, refuse: Callable[[str], BadUpdate]
) -> None:
    if set(found) != set(wanted):
        missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        raise refuse(f"{what} {missing[0]} is missing" if missing else f"{what} {extra[0]} was not asked for")
    for name, tensor in found.items():
        expected = wanted[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise refuse(
                f"{what} {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"expected {expected.dtype} {tuple(expected.shape)}"
            )
        if not _finite(tensor):
            raise refuse(f"{what} {name} holds NaN or infinite values")
