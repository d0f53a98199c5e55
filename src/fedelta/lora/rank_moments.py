"""Means and covariances over clients, rank index by rank index: what every method's step is made of.

For rank index j: contributors S_j = {i that trained j}, mass c_j = Σ_{S_j} p_i, means over the contributors

    b̄_j = Σ_{S_j} p_i s_i b_ij / c_j        ā_j = Σ_{S_j} p_i a_ij / c_j
    cov_j = Σ_{S_j} p_i (s_i b_ij − b̄_j)(a_ij − ā_j)

Clients are folded in one at a time as differences d from the first client that trained the index, the reference:

    b̄_j = b_ref + δ_j,  δ_j = Σ w_i d^b_ij / W_j        Σ_j cov_j = Σ_i p_i (d^b_ij − δ_j) · d^a_ij

so nothing is a difference of large products, and fp32 keeps its digits however close the clients are (sums of
differences run in float64). A reference adds nothing, so the factors have width Σ r_i − max r_i (docs/methods.md 2).
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.contribution import Contribution
from fedelta.lora.lowrank import LowRank, Product, add
from fedelta.lora.running_sum import RunningSum

Covariance = Literal["none", "total", "by rank"]
Padding = Literal["contributors", "zeros", "unchanged"]
Index = Tensor | slice


class _Module:
    """The moments of one module. Factors of B are kept in units of the first client's scale."""

    def __init__(self, before: LoraPair, ends: list[int]) -> None:
        m, n = before.shape
        R, dtype = before.rank, before.B.dtype
        self._scale: float | None = None
        self.B_ref, self.A_ref = torch.zeros(m, R, dtype=dtype), torch.zeros(R, n, dtype=dtype)
        self.B_sum = torch.zeros(m, R, dtype=torch.float64)  # Σ w_i d^b_ij
        self.A_sum = torch.zeros(R, n, dtype=torch.float64)
        self.blocks = list(zip([0, *ends], ends, strict=False))
        self.sums = [RunningSum(before.shape, dtype, R) for _ in self.blocks]
        self._filled = 0  # indices below have a reference, as long as clients train the first r_i
        self._weights: defaultdict[int, float] = defaultdict(float)  # weight by rank, of those clients
        self._mass: Tensor | None = None  # weight by index, once a client has trained others
        self._means: tuple[Tensor, Tensor] | None = None

    @property
    def scale(self) -> float:
        """s of the first client, the unit of B_ref and B_sum."""
        return 1.0 if self._scale is None else self._scale

    @property
    def mass(self) -> Tensor:
        """W_j, (R,), float64."""
        if self._mass is not None:
            return self._mass
        mass = torch.zeros(self.B_ref.shape[1], dtype=torch.float64)
        for rank, weight in self._weights.items():
            mass[:rank] += weight
        return mass

    def add(self, weight: float, pair: LoraPair, indices: Tensor | None) -> None:
        self._means = None
        if self._scale is None:
            self._scale = pair.scale
        if indices is None and self._mass is None:
            self._add_first(weight, pair)
        else:
            self._mass = self.mass
            self._add_any(weight, pair, torch.arange(pair.rank) if indices is None else indices)

    def _add_first(self, weight: float, pair: LoraPair) -> None:
        """A client that trained the first r indices: all is slices, which is what makes small layers fast."""
        r, held = pair.rank, min(self._filled, pair.rank)
        if r > held:
            self._refer(pair, slice(held, r), slice(held, r))
            self._filled = r
        b, a = self._differences(pair, slice(0, r))
        self.A_sum[:r].add_(a, alpha=weight)
        self.B_sum[:, :r].add_(b, alpha=weight)
        self._weights[r] += weight
        for (begin, end), total in zip(self.blocks, self.sums, strict=True):
            if begin < min(end, held):
                own = slice(begin, min(end, held))
                total.add(b[:, own], a[own], weight, own)

    def _add_any(self, weight: float, pair: LoraPair, indices: Tensor) -> None:
        fresh = self.mass[indices] == 0
        if bool(fresh.any()):
            self._refer(pair, fresh.nonzero()[:, 0], indices[fresh])
        b, a = self._differences(pair, indices)
        self.A_sum[indices] += weight * a
        self.B_sum[:, indices] += weight * b
        self.mass[indices] += weight
        for (begin, end), total in zip(self.blocks, self.sums, strict=True):
            own = ~fresh & (indices >= begin) & (indices < end)
            total.add(b[:, own], a[own], weight, indices[own])

    def _refer(self, pair: LoraPair, mine: Index, where: Index) -> None:
        """Make this client the reference of the indices that nobody has trained before it."""
        B = pair.B if pair.scale == self.scale else pair.B.double() * (pair.scale / self.scale)
        self.A_ref[where] = pair.A[mine].to(self.A_ref.dtype)
        self.B_ref[:, where] = B[:, mine].to(self.B_ref.dtype)

    def _differences(self, pair: LoraPair, where: Index) -> tuple[Tensor, Tensor]:
        """d^b (m, r) and d^a (r, n)."""
        dtype = self.B_ref.dtype
        a = pair.A.to(dtype) - self.A_ref[where]
        if pair.scale == self.scale:
            return pair.B.to(dtype) - self.B_ref[:, where], a
        # s·B rounded to fp32 would differ from the reference by that rounding: subtract first.
        return (pair.B.double() * (pair.scale / self.scale) - self.B_ref[:, where]).to(dtype), a

    def means(self) -> tuple[Tensor, Tensor]:
        """b̄ (m, R) and ā (R, n) in float64; zero where nobody trained."""
        if self._means is None:
            mass = self._divisor()
            B = (self.B_sum / mass).add_(self.B_ref).mul_(self.scale)
            self._means = B, (self.A_sum / mass[:, None]).add_(self.A_ref)
        return self._means

    def _divisor(self) -> Tensor:
        mass = self.mass
        return torch.where(mass > 0, mass, 1.0)

    def covariance(self, block: int, weight: float) -> Product:
        """Σ_j Σ_i w_i (d^b_ij − δ_j) d^a_ij / weight over the indices of a block. Uses up the block's sum."""
        shift = self.B_sum / self._divisor()
        begin, end = self.blocks[block]
        return self.sums[block].value(self.scale / weight, shift, self.A_sum, slice(begin, end))


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
    """

    def __init__(
        self,
        previous: Adapter,
        contributions: Iterable[Contribution] = (),
        covariance: Covariance = "none",
        ranks: Iterable[int] = (),
    ) -> None:
        self.previous = previous
        self.kind = covariance
        self.weight = 0.0
        self._finished: dict[str, list[tuple[Product, float]]] = {}
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
        """Fold one client in.

        Raises:
            ValueError: once a covariance has been read: it is finished by that.
        """
        if self._finished:
            raise ValueError("a client came after the covariance was read")
        if contribution.weight == 0:
            return
        self.weight += contribution.weight
        for module, pair in contribution.adapter.items():
            self._modules[module].add(contribution.weight, pair, contribution.indices)

    def share(self, module: str) -> Tensor:
        """c_j, (R,), float64: the mass of the contributors of each rank index."""
        return self._modules[module].mass / (self.weight or 1.0)

    def means(self, padding: Padding = "contributors") -> Adapter:
        """The mean factors, at scale 1 and in the dtype of the previous adapter.

        Args:
            padding: what a client counts as where it trained nothing: the mean of those that did (b̄_j, ā_j),
                zeros (c_j b̄_j, c_j ā_j), or the previous values (c_j b̄_j + (1 − c_j) b⁰_j). An index that nobody
                trained keeps its previous values in each case.
        """
        return Adapter({module: self.mean(module, padding) for module in self._modules})

    def mean(self, module: str, padding: Padding = "contributors") -> LoraPair:
        """The mean factors of one module, as `means` has them."""
        before, c = self.previous[module], self.share(module)
        B, A = self._modules[module].means()
        if padding == "unchanged":
            # b̄ itself, to the bit, where everybody contributed.
            B0, A0 = before.B.double(), before.A.double()
            B = torch.where(c == 1, B, B0 + c * (B - B0))
            A = torch.where(c[:, None] == 1, A, A0 + c[:, None] * (A - A0))
        elif padding == "zeros":
            B, A = c * B, c[:, None] * A
        B, A = B.to(before.B.dtype), A.to(before.A.dtype)
        if not bool((c > 0).all()):
            B, A = torch.where(c > 0, B, before.B), torch.where(c[:, None] > 0, A, before.A)
        return LoraPair(A, B)

    def covariance(self, module: str) -> Product:
        """Σ_j cov_j, (m, n).

        Raises:
            ValueError: unless a covariance was asked for.
        """
        if self.kind == "none":
            raise ValueError("no covariance was kept: the method must say covariance = 'total'")
        weight = self.weight or 1.0
        return add([block.scaled(w / weight) for block, w in self._blocks(module)])

    def normalized_covariance(self, module: str) -> Product:
        """Σ_j cov_j / c_j, (m, n): each index by its own contributors.

        Raises:
            ValueError: unless the covariance is kept by rank.
        """
        if self.kind != "by rank":
            raise ValueError("the covariance is not kept by rank: the method must say covariance = 'by rank'")
        return add([block for block, _ in self._blocks(module)])

    def _blocks(self, module: str) -> list[tuple[Product, float]]:
        """Σ_j cov_j / c_j and the mass w of each block. Its indices have the same contributors, hence the same mass."""
        if module not in self._finished:
            moments = self._modules[module]
            # In one block for all indices masses differ, and the whole weight stands for them.
            whole = self.kind == "total"
            masses = [self.weight if whole else float(moments.mass[end - 1]) for _, end in moments.blocks]
            self._finished[module] = [(moments.covariance(k, w or 1.0), w) for k, w in enumerate(masses)]
        return self._finished[module]

    def mean_product(self, module: str) -> Product:
        """Σ_i p_i s_i B_i A_i, (m, n), of width Σ r_i: what absent indices add is zero."""
        return add(self.mean_terms(module))

    def mean_terms(self, module: str) -> list[Product]:
        """Σ_j c_j b̄_j ā_j, a column for each index that somebody trained, in order, and Σ_j cov_j: the mean product."""
        c, dtype = self.share(module), self.previous[module].B.dtype
        B, A = self._modules[module].means()
        held = c > 0
        if not bool(held.all()):
            B, A, c = B[:, held], A[held], c[held]
        return [LowRank((c * B).to(dtype), A.to(dtype)), self.covariance(module)]
