"""The door: an update is checked against the broadcast that it answers, once, and never again inside."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedelta.errors import BadUpdate, NotFinite
from fedelta.lora.adapter import Adapter, LoraPair, Shapes, draw_basis, finite
from fedelta.lora.contribution import Contribution
from fedelta.protocol.messages import Broadcast, ClientUpdate

MAX_EXAMPLES = 10**12
"""A client that claims more would drown all others by a slip or by intent."""
MAX_METRIC = 1e30
"""Sums of metrics stay finite below this."""


def shown(value: object) -> str:
    """A value as a short text: a number of 400 digits, or one too long to be printed, is no way to fill a log."""
    try:
        return repr(value)[:20]
    except ValueError:
        return f"a {type(value).__name__} too long to print"


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

    def refuse(reason: str, kind: type[BadUpdate] = BadUpdate) -> BadUpdate:
        return kind(sent.client, reason)

    for name in ("client", "round", "scale"):
        found, expected = getattr(update, name), getattr(sent, name)
        if found != expected:
            raise refuse(f"its update says {name} {found}, expected {expected}")
    lowest = 1 if sent.plan.prune else sent.rank
    if type(update.rank) is not int or not lowest <= update.rank <= sent.rank:
        raise refuse(f"its update says rank {str(update.rank)[:20]}, expected {sent.rank}")
    if (update.version, update.digest) != (sent.patch.end, sent.patch.digests[sent.patch.end]):
        raise refuse(f"it trained on base version {update.version}, expected {sent.patch.end}")
    if type(update.examples) is not int or not 1 <= update.examples <= MAX_EXAMPLES:
        raise refuse(f"it reports {str(update.examples)[:20]} training examples, expected 1 to {MAX_EXAMPLES}")
    if not isinstance(update.metrics, Mapping):
        raise refuse(f"its metrics are a {type(update.metrics).__name__}, expected names and numbers")
    for name, value in update.metrics.items():
        if not isinstance(value, int | float) or not abs(value) <= MAX_METRIC:
            kind = NotFinite if isinstance(value, float) and not math.isfinite(value) else BadUpdate
            raise refuse(f"it reports {name} {shown(value)}, expected a finite number", kind)
    start = sent.adapter(shapes).truncate(update.rank)
    if set(update.factors) != sent.plan.up:
        found, expected = (", ".join(sorted(names)) or "nothing" for names in (update.factors, sent.plan.up))
        raise refuse(f"it sent the factors {found}, expected {expected}")
    pairs = dict(start)
    for name, found in update.factors.items():
        wanted = {module: _expected_shape(name, pair) for module, pair in start.items()}
        _same_tensors(found, wanted, f"{name} of module", refuse)
        for module, tensor in found.items():
            pair = pairs[module]
            if name == "A":
                pairs[module] = LoraPair(tensor, pair.B, pair.scale)
            else:
                B = tensor if name == "B" else draw_basis(module, pair.shape[0], pair.rank, sent.seed) @ tensor
                pairs[module] = LoraPair(pair.A, B, pair.scale)
    heads = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in sent.heads.items()}
    _same_tensors(update.heads, heads, "head", refuse)
    w = update.examples if weight is None else weight
    indices = None if sent.indices is None else torch.tensor(sent.indices)
    return Contribution(sent.client, w, Adapter(pairs), indices, update.heads, update.metrics)


def _expected_shape(factor: str, pair: LoraPair) -> tuple[tuple[int, ...], torch.dtype]:
    shapes = {"A": tuple(pair.A.shape), "B": tuple(pair.B.shape), "core": (pair.rank, pair.rank)}
    return shapes[factor], pair.B.dtype


def _same_tensors(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    what: str,
    refuse: Callable[..., BadUpdate],
) -> None:
    if set(found) != set(wanted):
        missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        raise refuse(f"{what} {missing[0]} is missing" if missing else f"{what} {extra[0]} was not asked for")
    for name, tensor in found.items():
        shape, dtype = wanted[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise refuse(f"{what} {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
        if not finite(tensor):
            raise refuse(f"{what} {name} holds NaN or infinite values", NotFinite)
