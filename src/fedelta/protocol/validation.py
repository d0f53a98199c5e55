"""Validation of a client's update against the broadcast that it belongs to.

This is the only place where the content of one update is checked. The code behind it relies on it: no sum, product or
square of a round can overflow. `federation/outliers.py` compares the updates of a round with each other.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedelta.errors import BadUpdate, NotFinite, listed
from fedelta.lora.adapter import Adapter, LoraPair, Shapes, draw_basis, finite
from fedelta.lora.contribution import Contribution, Norms
from fedelta.protocol.messages import Broadcast, ClientUpdate
from fedelta.protocol.serialization import show

MAX_EXAMPLES = 10**12
"""Largest number of training examples that a client may report. A larger one would outweigh all other clients."""
MAX_METRIC = 1e30
"""Largest metric. Sums of metrics stay finite below it."""
METRICS = ("train_loss", "validation_loss")
"""Metrics that a client may report. Both are losses, so they are not negative."""
MAX_NORM = 1e8
"""Largest Frobenius norm of a tensor, and of a product s·B·A.

The factors of a trained adapter have norms below 1e4. The largest numbers that the server computes are squares of
products of two factors of different clients: at most (1e8 · 1e8)² = 1e32, times the ratio of their scales. fp32 holds
numbers up to 3e38, so no sum of a round overflows.
"""


def receive(
    update: ClientUpdate, sent: Broadcast, shapes: Shapes, weight: float | None = None, rows: int | None = None
) -> Contribution:
    """Validate an update against its broadcast and fill in the factors that the client did not send.

    Args:
        update: the client's update.
        sent: the broadcast that the client received.
        shapes: module → (m, n) of the adapted layers.
        weight: w_i; None uses the number of examples.
        rows: number of rows that the client has, as far as the server knows; it can't have trained on more.

    Raises:
        BadUpdate: naming the client, what was found and what was expected.
    """

    def refuse(reason: str, kind: type[BadUpdate] = BadUpdate) -> BadUpdate:
        return kind(sent.client, reason)

    _check_facts(update, sent, rows, refuse)
    start = sent.adapter(shapes).truncate(update.rank)
    if set(update.factors) != sent.plan.up:
        found, expected = (listed(sorted(names)) for names in (update.factors, sent.plan.up))
        raise refuse(f"its update has the factors {found}, expected {expected}")
    pairs = dict(start)
    for name, tensors in update.factors.items():
        expected_tensors = {module: _expected_shape(name, pair) for module, pair in start.items()}
        _check_tensors(tensors, expected_tensors, f"{name} of module", refuse)
        for module, tensor in tensors.items():
            pair = pairs[module]
            if name == "A":
                pairs[module] = LoraPair(tensor, pair.B, pair.scale)
            else:
                B = tensor if name == "B" else draw_basis(module, pair.shape[0], pair.rank, sent.seed) @ tensor
                pairs[module] = LoraPair(pair.A, B, pair.scale)
    heads = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in sent.heads.items()}
    _check_tensors(update.heads, heads, "head", refuse)
    adapter = Adapter(pairs)
    _check_products(adapter, refuse)
    return Contribution(
        client=sent.client,
        weight=update.examples if weight is None else weight,
        adapter=adapter,
        indices=None if sent.indices is None else torch.tensor(sent.indices),
        heads=update.heads,
        metrics=update.metrics,
        norms=Norms.of(adapter, update.heads),
        start=Norms.of(start, sent.heads),
    )


def _check_facts(update: ClientUpdate, sent: Broadcast, rows: int | None, refuse: Callable[..., BadUpdate]) -> None:
    """Raise unless everything but the tensors fits the broadcast. The types have been validated by `ClientUpdate`."""
    for name in ("client", "round", "scale"):
        found, expected = getattr(update, name), getattr(sent, name)
        if found != expected:
            raise refuse(f"its update says {name} {found}, expected {expected}")
    min_rank = 1 if sent.plan.prune else sent.rank
    if not min_rank <= update.rank <= sent.rank:
        allowed = f"{sent.rank}" if min_rank == sent.rank else f"{min_rank} to {sent.rank}"
        raise refuse(f"its update says rank {show(update.rank)}, expected {allowed}")
    if (update.version, update.digest) != (sent.patch.end, sent.patch.digests[sent.patch.end]):
        digest = "" if update.version != sent.patch.end else " of another history"
        raise refuse(f"it trained on base version {show(update.version)}{digest}, expected {sent.patch.end}")
    max_examples = MAX_EXAMPLES if rows is None else min(rows, MAX_EXAMPLES)
    if not 1 <= update.examples <= max_examples:
        stated = "" if rows is None else ", the rows that it stated"
        raise refuse(f"it reports {show(update.examples)} training examples, expected 1 to {max_examples}{stated}")
    for name, value in update.metrics.items():
        if name not in METRICS:
            raise refuse(f"it reports {show(name)}, expected only {' and '.join(METRICS)}")
        if not 0 <= value <= MAX_METRIC:
            kind = BadUpdate if math.isfinite(value) else NotFinite
            raise refuse(f"it reports {name} {show(value)}, expected a finite number from 0 to {MAX_METRIC:g}", kind)


def _expected_shape(factor: str, pair: LoraPair) -> tuple[tuple[int, ...], torch.dtype]:
    shapes = {"A": tuple(pair.A.shape), "B": tuple(pair.B.shape), "core": (pair.rank, pair.rank)}
    return shapes[factor], pair.B.dtype


def _check_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    what: str,
    refuse: Callable[..., BadUpdate],
) -> None:
    """Raise unless the tensors have the expected names, shapes and dtypes, and are finite and not too large."""
    if set(tensors) != set(expected):
        missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        raise refuse(f"{what} {missing[0]} is missing" if missing else f"{what} {extra[0]} was not requested")
    for name, tensor in tensors.items():
        shape, dtype = expected[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise refuse(f"{what} {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
        if not _norm(tensor) <= MAX_NORM:
            if not finite(tensor):
                raise refuse(f"{what} {name} holds NaN or infinite values", NotFinite)
            size = _norm(tensor.double())
            raise refuse(f"{what} {name} has the norm {size:.1e}, expected at most {MAX_NORM:g}", NotFinite)


def _check_products(adapter: Adapter, refuse: Callable[..., BadUpdate]) -> None:
    """Raise if a product s·B·A could be too large. ‖s·B·A‖ ≤ |s|·‖B‖·‖A‖ holds for every product."""
    for module, pair in adapter.items():
        size = abs(pair.scale) * _norm(pair.B) * max(_norm(pair.A), 1.0)
        if not size <= MAX_NORM:
            raise refuse(
                f"B·A of module {module} may have the norm {size:.1e}, expected at most {MAX_NORM:g}", NotFinite
            )


def _norm(tensor: Tensor) -> float:
    """Frobenius norm. It is infinite or NaN if an element is, or if its square is too large for the dtype."""
    return float(torch.linalg.vector_norm(tensor))
