"""Means and covariances over clients, rank index by rank index: what every method's step is made of.

For rank index j: contributors S_j = {i that trained j}, mass c_j = Σ_{S_j} p_i, means over the contributors

    b̄_j = Σ_{S_j} p_i s_i b_ij / c_j        ā_j = Σ_{S_j} p_i a_ij / c_j
    cov_j = Σ_{S_j} p_i (s_i b_ij − b̄_j)(a_ij − ā_j)

Clients are folded in one at a time by Welford's update: a client that brings mass w to an index of mass W adds
w·W/(W+w) · (b − b̄)(a − ā), with the means of those before it. Means run in float64, and the covariance is never a
difference of large products, so in fp32 it keeps its digits however close the clients are. The first holder of an
index adds nothing, so the factors of Σ_j cov_j have width Σ r_i − max r_i (docs/methods.md 2).
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from fedelta.adapter import Adapter, LoraPair
from fedelta.contribution import Contribution
from fedelta.lowrank import LowRank, Product, add
from fedelta.product_sum import ProductSum

Covariance = Literal["none", "total", "by rank"]


class _Module:
    """The moments of one module. Means have the rank index first: (R, m) and (R, n)."""

    def __init__(self, pair: LoraPair, blocks: list[int]) -> None:
        self.B = torch.zeros(pair.rank, pair.shape[0], dtype=torch.float64)
        self.A = torch.zeros(pair.rank, pair.shape[1], dtype=torch.float64)
        self.mass = torch.zeros(pair.rank, dtype=torch.float64)
        self.ends = blocks
        self.covariance = [ProductSum(pair.shape, pair.B.dtype) for _ in blocks]

    def add(self, weight: float, pair: LoraPair, index: Tensor | slice) -> None:
        mass, B, A = self.mass[index], self.B[index], self.A[index]
        b = (pair.scale * pair.B.T.double()).sub_(B)  # (r, m)
        a = pair.A.double() - A  # (r, n)
        share = weight / (mass + weight)
        if self.covariance:
            self._add_covariance((mass * share)[:, None] * b, a, mass > 0, index)
        self.B[index] = torch.addcmul(B, share[:, None], b)
        self.A[index] = torch.addcmul(A, share[:, None], a)
        self.mass[index] = mass + weight

    def _add_covariance(self, b: Tensor, a: Tensor, held: Tensor, index: Tensor | slice) -> None:
        if len(self.ends) == 1:
            if bool(held.all()):
                self.covariance[0].add(b, a)
            else:
                self.covariance[0].add(b[held], a[held])
            return
        positions = torch.arange(len(self.mass))[index]
        begin = 0
        for end, total in zip(self.ends, self.covariance, strict=True):
            rows = held & (positions >= begin) & (positions < end)
            total.add(b[rows], a[rows])
            begin = end


class RankMoments:
    """Moments of the contributions of a round.

    Args:
        previous: the global adapter, scale 1; an index that nobody in the round trained keeps its values.
        contributions: consumed once; each is folded in and dropped. More can follow by `add`.
        covariance: none, Σ_j cov_j, or kept apart by blocks of rank indices that have the same contributors, so
            that each can be divided by its own c_j.
        ranks: the ranks that clients may have, which are the ends of those blocks; unknown, every index is its own.

    Attributes:
        weight: Σ w_i.
        clients: number of contributions of positive weight.
    """

    def __init__(
        self,
        previous: Adapter,
        contributions: Iterable[Contribution] = (),
        covariance: Covariance = "none",
        ranks: Iterable[int] = (),
    ) -> None:
        self.previous = previous
        self.weight = 0.0
        self.clients = 0
        self._modules = {}
        for module, pair in previous.items():
            ends = {
                "none": [],
                "total": [pair.rank],
                "by rank": sorted({r for r in ranks if r < pair.rank} | {pair.rank})
                if ranks
                else list(range(1, pair.rank + 1)),
            }[covariance]
            self._modules[module] = _Module(pair, ends)
        for contribution in contributions:
            self.add(contribution)

    def add(self, contribution: Contribution) -> None:
        """Fold one client in."""
        if contribution.weight == 0:
            return
        self.weight += contribution.weight
        self.clients += 1
        for module, pair in contribution.adapter.items():
            index = slice(0, pair.rank) if contribution.indices is None else contribution.indices
            self._modules[module].add(contribution.weight, pair, index)

    def share(self, module: str) -> Tensor:
        """c_j, (R,), float64: the mass of the contributors of each rank index."""
        return self._modules[module].mass / (self.weight or 1.0)

    def means(self, padding: Literal["contributors", "zeros", "unchanged"] = "contributors") -> Adapter:
        """The mean factors, at scale 1 and in the dtype of the previous adapter.

        Args:
            padding: what a client counts as where it trained nothing: the mean of those that did (b̄_j, ā_j),
                zeros (c_j b̄_j, c_j ā_j), or the previous values (c_j b̄_j + (1 − c_j) b⁰_j). An index that nobody
                trained keeps its previous values in each case.
        """
        return Adapter({module: self._mean(module, padding) for module in self._modules})

    def _mean(self, module: str, padding: str) -> LoraPair:
        moments, before = self._modules[module], self.previous[module]
        B0, A0 = before.B.T.double(), before.A.double()
        c = self.share(module)[:, None]
        if padding == "unchanged":
            # b̄ itself, to the bit, where everybody contributed.
            B = torch.where(c == 1, moments.B, B0 + c * (moments.B - B0))
            A = torch.where(c == 1, moments.A, A0 + c * (moments.A - A0))
        else:
            factor = c if padding == "zeros" else 1.0
            B, A = factor * moments.B, factor * moments.A
        B, A = torch.where(c > 0, B, B0), torch.where(c > 0, A, A0)
        return LoraPair(A.to(before.A.dtype), B.T.to(before.B.dtype).contiguous())

    def covariance(self, module: str) -> Product:
        """Σ_j cov_j, (m, n). Used up by the call."""
        (total,) = self._modules[module].covariance
        return total.value(1 / (self.weight or 1.0))

    def normalised_covariance(self, module: str) -> Product:
        """Σ_j cov_j / c_j, (m, n): each index by its own contributors. Used up by the call."""
        moments = self._modules[module]
        # All indices of a block have the same contributors, hence the same mass.
        masses = [float(moments.mass[end - 1]) for end in moments.ends]
        terms = [block.value(1 / (w or 1.0)) for block, w in zip(moments.covariance, masses, strict=True)]
        return add(terms)

    def mean_product(self, module: str) -> Product:
        """Σ_i p_i s_i B_i A_i = Σ_j c_j b̄_j ā_j + cov_j, (m, n), of width Σ r_i: what absent indices add is zero.

        Uses up the covariance.
        """
        moments = self._modules[module]
        c, dtype = self.share(module), self.previous[module].B.dtype
        held = c > 0
        centre = LowRank((c * moments.B.T)[:, held].to(dtype), moments.A[held].to(dtype))
        return add([centre, self.covariance(module)])
