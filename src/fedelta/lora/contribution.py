"""`Contribution`: one client's part in a round, with the factors that it did not train filled in."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fedelta.lora.adapter import Adapter


class Norms(NamedTuple):
    """Frobenius norms of what a client trains.

    Args:
        adapter: √(Σ ‖A‖² + ‖s·B‖²) over the modules.
        heads: the same of the trained modules outside LoRA.
    """

    adapter: float = 0.0
    heads: float = 0.0

    @classmethod
    def of(cls, adapter: Adapter, heads: Mapping[str, Tensor]) -> "Norms":
        """Return the norms of an adapter and heads."""
        squares = (_square(pair.A) + pair.scale**2 * _square(pair.B) for pair in adapter.values())
        return cls(math.sqrt(sum(squares)), math.sqrt(sum(map(_square, heads.values()))))


def _square(tensor: Tensor) -> float:
    """Sum of squares in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


NO_NORMS = Norms()


@dataclass(frozen=True, eq=False)
class Contribution:
    """A validated update of one client, with its frozen factors filled in.

    Args:
        client: id of the client.
        weight: w_i, not normalized.
        adapter: s_i·B_i·A_i of every module.
        indices: rank indices of the global adapter that the client trained, (r_i,); None means the first r_i.
        heads: name → tensor, the trained modules outside LoRA.
        metrics: name → finite number.
        norms: norms of the adapter and the heads; zero if they were not measured.
        start: the same norms of what the client was sent.
    """

    client: str
    weight: float
    adapter: Adapter
    indices: Tensor | None = None
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    norms: Norms = NO_NORMS
    start: Norms = NO_NORMS
