"""Means and covariances over clients for each rank index: the building blocks of every method's step.

Rank index j has the contributors S_j = {i that trained j}, the mass c_j = Σ_{S_j} p_i, and the contributors' means

    b̄_j = Σ_{S_j} p_i s_i b_ij / c_j        ā_j = Σ_{S_j} p_i a_ij / c_j
    cov_j = Σ_{S_j} p_i (s_i b_ij − b̄_j)(a_ij − ā_j)

Clients are added one at a time as differences d from the reference, the first client that trained the index:

    b̄_j = b_ref + δ_j,  δ_j = Σ w_i d^b_ij / W_j        Σ_j cov_j = Σ_i p_i (d^b_ij − δ_j) · d^a_ij

No large products are subtracted, so fp32 keeps its digits even if clients are very close (sums of differences are in
float64). A reference adds nothing, so the factors have width Σ r_i − max r_i (docs/methods.md 2).
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
    """Moments of one module. Factors B are stored in units of the first client's scale.

    Args:
        before: pair of the global adapter, which gives the shapes.
        ends: end (exclusive) of each block of rank indices whose covariance is kept apart; empty keeps none.
    """

    def __init__(self, before: LoraPair, ends: list[int]) -> None:
        m, n = before.shape
        R, dtype = before.rank, before.B.dtype
        self._scale: float | None = None
        self.B_ref, self.A_ref = torch.zeros(m, R, dtype=dtype), torch.zeros(R, n, dtype=dtype)
        self.B_sum = torch.zeros(m, R, dtype=torch.float64)  # Σ w_i d^b_ij
        self.A_sum = torch.zeros(R, n, dtype=torch.float64)
        self.blocks = list(zip([0, *ends], ends, strict=False))
        self.sums = [RunningSum(before.shape, dtype, R) for _ in self.blocks]
        # As long as every client trains its first r_i indices, two numbers per rank describe all masses.
        self._filled = 0  # the indices below this one have a reference
        self._weights: defaultdict[int, float] = defaultdict(float)  # rank → sum of weights
        self._mass: Tensor | None = None  # W_j, (R,), once a client has trained other indices
        self._means: tuple[Tensor, Tensor] | None = None

    @property
    def scale(self) -> float:
        """Scale s of the first client, the unit of B_ref and B_sum."""
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
        """Add a client that trained the first r indices. Slices alone suffice here, which keeps small layers fast."""
        r, referenced = pair.rank, min(self._filled, pair.rank)
        if r > referenced:
            self._set_reference(pair, slice(referenced, r), slice(referenced, r))
            self._filled = r
        b, a = self._differences(pair, slice(0, r))
        self.A_sum[:r].add_(a, alpha=weight)
        self.B_sum[:, :r].add_(b, alpha=weight)
        self._weights[r] += weight
        for (begin, end), total in zip(self.blocks, self.sums, strict=True):
            if begin < min(end, referenced):
                block = slice(begin, min(end, referenced))
                total.add(b[:, block], a[block], weight, block)

    def _add_any(self, weight: float, pair: LoraPair, indices: Tensor) -> None:
        """Add a client that trained any indices, (r,)."""
        fresh = self.mass[indices] == 0
        if bool(fresh.any()):
            self._set_reference(pair, fresh.nonzero()[:, 0], indices[fresh])
        b, a = self._differences(pair, indices)
        self.A_sum[indices] += weight * a
        self.B_sum[:, indices] += weight * b
        self.mass[indices] += weight
        for (begin, end), total in zip(self.blocks, self.sums, strict=True):
            block = ~fresh & (indices >= begin) & (indices < end)
            total.add(b[:, block], a[block], weight, indices[block])

    def _set_reference(self, pair: LoraPair, own: Index, where: Index) -> None:
        """Make this client the reference of the indices that no client has trained before.

        Args:
            own: position of these indices in the client's pair.
            where: the same indices in the global adapter.
        """
        B = pair.B if pair.scale == self.scale else pair.B.double() * (pair.scale / self.scale)
        self.A_ref[where] = pair.A[own].to(self.A_ref.dtype)
        self.B_ref[:, where] = B[:, own].to(self.B_ref.dtype)

    def _differences(self, pair: LoraPair, where: Index) -> tuple[Tensor, Tensor]:
        """Return the differences d^b (m, r) and d^a (r, n) from the reference."""
        dtype = self.B_ref.dtype
        a = pair.A.to(dtype) - self.A_ref[where]
        if pair.scale == self.scale:
            return pair.B.to(dtype) - self.B_ref[:, where], a
        # Subtract before rounding to fp32: the rounding error of s·B would otherwise enter the difference.
        return (pair.B.double() * (pair.scale / self.scale) - self.B_ref[:, where]).to(dtype), a

    def means(self) -> tuple[Tensor, Tensor]:
        """Return b̄ (m, R) and ā (R, n) in float64; zero where no client trained."""
        if self._means is None:
            mass = self._divisor()
            B = (self.B_sum / mass).add_(self.B_ref).mul_(self.scale)
            self._means = B, (self.A_sum / mass[:, None]).add_(self.A_ref)
        return self._means

    def _divisor(self) -> Tensor:
        """Return W_j, (R,), with 1 where it is zero."""
        mass = self.mass
        return torch.where(mass > 0, mass, 1.0)

    def covariance(self, block: int, weight: float) -> Product:
        """Return Σ_j Σ_i w_i (d^b_ij − δ_j) d^a_ij / weight over the indices of a block. Consumes the block's sum."""
        shift = self.B_sum / self._divisor()
        begin, end = self.blocks[block]
        return self.sums[block].value(self.scale / weight, shift, self.A_sum, slice(begin, end))


class RankMoments:
    """Moments of the contributions of a round.

    Args:
        previous: global adapter at scale 1. An index that no client trained in the round keeps its values.
        contributions: iterated once; each contribution is added and dropped. `add` accepts more.
        covariance: "none"; "total" for Σ_j cov_j; or "by rank" to keep blocks of rank indices with the same
            contributors apart, so that each block can be divided by its own c_j.
        ranks: ranks that clients may have, which are the ends of those blocks. If empty, every index is a block.

    Attributes:
        weight: Σ w_i.

    Example:
        >>> from fedelta.lora.adapter import initial_adapter
        >>> previous = initial_adapter({"q": (3, 4)}, rank=2, seed=0)
        >>> clients = [
        ...     Contribution("a", 1.0, previous.map(lambda pair: LoraPair(pair.A, pair.B + 1))),
        ...     Contribution("b", 3.0, previous.truncate(1).map(lambda pair: LoraPair(pair.A, pair.B + 5))),
        ... ]
        >>> moments = RankMoments(previous, clients)
        >>> moments.share("q")  # client b does not hold the second rank index
        tensor([1.0000, 0.2500], dtype=torch.float64)
        >>> moments.means()["q"].B[0]  # (1·1 + 3·5)/4, and client a alone
        tensor([4., 1.])
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
            self._modules[module] = _Module(pair, _block_ends(covariance, pair.rank, ranks))
        for contribution in contributions:
            self.add(contribution)

    def add(self, contribution: Contribution) -> None:
        """Add one client.

        Raises:
            ValueError: if a covariance has been read, because reading it consumes the sums.
        """
        if self._finished:
            raise ValueError("a client was added after the covariance was read")
        if contribution.weight == 0:
            return
        self.weight += contribution.weight
        for module, pair in contribution.adapter.items():
            self._modules[module].add(contribution.weight, pair, contribution.indices)

    def share(self, module: str) -> Tensor:
        """Return c_j, (R,), float64: the mass of the contributors of each rank index."""
        return self._modules[module].mass / (self.weight or 1.0)

    def means(self, padding: Padding = "contributors") -> Adapter:
        """Return the mean factors, at scale 1 and in the dtype of the previous adapter.

        Args:
            padding: value that stands in for an index that a client did not train: "contributors" for the mean of the
                clients that did (result b̄_j, ā_j), "zeros" (c_j b̄_j, c_j ā_j), or "unchanged" for the previous value
                (c_j b̄_j + (1 − c_j) b⁰_j). An index that no client trained always keeps its previous value.
        """
        return Adapter({module: self.mean(module, padding) for module in self._modules})

    def mean(self, module: str, padding: Padding = "contributors") -> LoraPair:
        """Return the mean factors of one module, as in `means`."""
        before, c = self.previous[module], self.share(module)
        B, A = self._modules[module].means()
        if padding == "unchanged":
            # Where all clients contributed, the result is b̄ itself, bit for bit.
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
        """Return Σ_j cov_j, (m, n).

        Raises:
            ValueError: if no covariance was kept.
        """
        if self.kind == "none":
            raise ValueError("no covariance was kept: the method must set covariance = 'total'")
        weight = self.weight or 1.0
        return add([block.scaled(w / weight) for block, w in self._blocks(module)])

    def normalized_covariance(self, module: str) -> Product:
        """Return Σ_j cov_j / c_j, (m, n): each index is normalized by its own contributors.

        Raises:
            ValueError: if the covariance was not kept by rank.
        """
        if self.kind != "by rank":
            raise ValueError("the covariance was not kept by rank: the method must set covariance = 'by rank'")
        return add([block for block, _ in self._blocks(module)])

    def _blocks(self, module: str) -> list[tuple[Product, float]]:
        """Return Σ_j cov_j / c_j and the mass w of each block. Indices of a block share contributors and mass."""
        if module not in self._finished:
            moments = self._modules[module]
            # The single block of "total" has indices of different masses; the total weight replaces them.
            whole = self.kind == "total"
            masses = [self.weight if whole else float(moments.mass[end - 1]) for _, end in moments.blocks]
            self._finished[module] = [(moments.covariance(k, w or 1.0), w) for k, w in enumerate(masses)]
        return self._finished[module]

    def mean_product(self, module: str) -> Product:
        """Return Σ_i p_i s_i B_i A_i, (m, n), of width Σ r_i. An index that a client lacks adds zero."""
        return add(self.mean_terms(module))

    def mean_terms(self, module: str) -> list[Product]:
        """Return the two terms of the mean product: Σ_j c_j b̄_j ā_j and Σ_j cov_j.

        The first term has one column for each trained index, in order.
        """
        c, dtype = self.share(module), self.previous[module].B.dtype
        B, A = self._modules[module].means()
        trained = c > 0
        if not bool(trained.all()):
            B, A, c = B[:, trained], A[trained], c[trained]
        return [LowRank((c * B).to(dtype), A.to(dtype)), self.covariance(module)]


def _block_ends(covariance: Covariance, rank: int, ranks: Iterable[int]) -> list[int]:
    """Return the end (exclusive) of each block of rank indices whose covariance is kept apart."""
    if covariance == "none":
        return []
    if covariance == "total":
        return [rank]
    return sorted({r for r in ranks if r < rank} | {rank}) if ranks else list(range(1, rank + 1))
