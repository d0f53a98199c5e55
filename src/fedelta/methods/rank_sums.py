"""Weighted sums over clients, rank index by rank index: what every mean of factors is made of.

For rank index j: contributors S_j = {i : r_i > j}, mass c_j = Σ_{S_j} p_i. Sums run in float64, one client
at a time, so the sums need no more memory for more clients, and the order matters only to rounding.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedelta.adapter import Adapter, LoraPair
from fedelta.methods.method import Contribution


@dataclass(eq=False)
class _Sums:
    B: Tensor  # (m, R), Σ w_i s_i B_i
    A: Tensor  # (R, n), Σ w_i A_i
    mass: Tensor  # (R,), Σ_{S_j} w_i


class RankSums:
    """Σ w_i s_i B_i, Σ w_i A_i and the mass of each rank index, for every module of an adapter.

    Args:
        previous: the global adapter, scale 1; an index that nobody in the round holds keeps its values.
    """

    def __init__(self, previous: Adapter) -> None:
        self.previous = previous
        self.weight = 0.0
        self._sums = {
            module: _Sums(
                torch.zeros_like(pair.B, dtype=torch.float64),
                torch.zeros_like(pair.A, dtype=torch.float64),
                torch.zeros(pair.rank, dtype=torch.float64),
            )
            for module, pair in previous.items()
        }

    @classmethod
    def of(cls, previous: Adapter, contributions: Iterable[Contribution]) -> "RankSums":
        sums = cls(previous)
        for contribution in contributions:
            sums.add(contribution)
        return sums

    def add(self, contribution: Contribution) -> None:
        self.weight += contribution.weight
        for module, pair in contribution.adapter.items():
            sums, r = self._sums[module], pair.rank
            sums.B[:, :r] += contribution.weight * pair.scale * pair.B.double()
            sums.A[:r] += contribution.weight * pair.A.double()
            sums.mass[:r] += contribution.weight

    def share(self, module: str) -> Tensor:
        """c_j, (R,), float64: the mass of the contributors of each rank index."""
        return self._sums[module].mass / self.weight

    def contributor_means(self, dtype: torch.dtype | None = None) -> Adapter:
        """b̄_j = Σ_{S_j} p_i b_ij / c_j and ā_j likewise; previous values where c_j = 0.

        Args:
            dtype: of the result; None keeps that of the previous adapter.
        """
        return Adapter({m: self._mean(m, self._sums[m].mass, dtype) for m in self._sums})

    def zero_padded_means(self) -> Adapter:
        """Σ_{S_j} p_i b_ij and Σ_{S_j} p_i a_ij: absent clients count as zeros; previous where c_j = 0."""
        return Adapter({m: self._mean(m, torch.full_like(s.mass, self.weight)) for m, s in self._sums.items()})

    def _mean(self, module: str, divisor: Tensor, dtype: torch.dtype | None = None) -> LoraPair:
        sums, before = self._sums[module], self.previous[module]
        held = sums.mass > 0
        divisor = torch.where(held, divisor, 1.0)
        B = torch.where(held, sums.B / divisor, before.B.double())
        A = torch.where(held[:, None], sums.A / divisor[:, None], before.A.double())
        return LoraPair(A.to(dtype or before.A.dtype), B.to(dtype or before.B.dtype))
