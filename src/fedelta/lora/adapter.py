"""LoRA pairs and adapters. **The only file that computes α/r.**

One adapted layer has the update ΔW = s·B·A with B (m, r), A (r, n) and s = α/r, or s = α/√r for rsLoRA
(Kalajdzievski 2312.03732). All other code reads `LoraPair.scale` and never computes it.
Shapes are those of the layer as a Linear, out×in. Code that touches the weight of a Conv1D (`fan_in_fan_out`)
transposes it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.lora.lowrank import LowRank
from fedelta.seeds import derive_seed

ScaleRule = Literal["alpha/r", "alpha/sqrt(r)", "alpha"]
Shapes = Mapping[str, tuple[int, int]]
"""Module name → (m, n), out×in."""


def lora_scale(alpha: float, rank: int, rule: ScaleRule = "alpha/r") -> float:
    """Return the scale s of s·B·A: α/r (LoRA), α/√r (rsLoRA, 2312.03732), or α independent of the rank.

    Example:
        >>> lora_scale(alpha=16, rank=4)
        4.0
        >>> lora_scale(alpha=16, rank=4, rule="alpha/sqrt(r)")
        8.0

    Raises:
        FedeltaError: if the rank is below 1.
    """
    if rank < 1:
        raise FedeltaError(f"a LoRA rank must be at least 1, found {rank}")
    return {"alpha/r": alpha / rank, "alpha/sqrt(r)": alpha / sqrt(rank), "alpha": alpha}[rule]


def lora_alpha(scale: float, rank: int, rule: ScaleRule = "alpha/r") -> float:
    """Return the α that gives `scale` at `rank`: the `lora_alpha` of a PEFT configuration."""
    return scale / lora_scale(1.0, rank, rule)


@dataclass(frozen=True, eq=False)
class LoraPair:
    """The update s·B·A of one layer.

    Args:
        A: shape (r, n).
        B: shape (m, r).
        scale: s.

    Raises:
        FedeltaError: if A and B do not share a rank.

    Example:
        >>> pair = LoraPair(A=torch.ones(2, 4), B=torch.ones(3, 2), scale=0.5)
        >>> pair.rank, pair.shape
        (2, (3, 4))
        >>> pair.with_scale(1.0).B[0]  # the scale is absorbed into B
        tensor([0.5000, 0.5000])
    """

    A: Tensor  # (r, n)
    B: Tensor  # (m, r)
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise FedeltaError(f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} do not share a rank")

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the layer."""
        return self.B.shape[0], self.A.shape[1]

    def product(self) -> LowRank:
        """Return s·B·A as a `LowRank` of width r."""
        return LowRank(self.B * self.scale, self.A)

    def with_scale(self, scale: float) -> "LoraPair":
        """Return the same product at another scale, with B·(s/scale). Scale 1 absorbs s into B."""
        if scale == self.scale:
            return self
        return LoraPair(self.A, self.B * (self.scale / scale), scale)

    def select(self, indices: Tensor) -> "LoraPair":
        """Return the pair of these rank indices alone."""
        return LoraPair(self.A[indices].contiguous(), self.B[:, indices].contiguous(), self.scale)

    def truncate(self, rank: int) -> "LoraPair":
        """Return the first `rank` columns of B and rows of A, which a client of that rank downloads."""
        return LoraPair(self.A[:rank].contiguous(), self.B[:, :rank].contiguous(), self.scale)


@dataclass(frozen=True, eq=False)
class Adapter(Mapping[str, LoraPair]):
    """A LoRA adapter: module name → `LoraPair`, sorted by name.

    Args:
        pairs: module name → pair.

    Example:
        >>> adapter = initial_adapter({"q": (6, 4), "v": (6, 4)}, rank=2, seed=0)
        >>> adapter.rank, adapter.parameters
        (2, 40)
        >>> adapter.truncate(1)["q"].A.shape
        torch.Size([1, 4])
    """

    pairs: Mapping[str, LoraPair]

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", dict(sorted(self.pairs.items())))

    def __getitem__(self, module: str) -> LoraPair:
        return self.pairs[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def rank(self) -> int:
        """Largest rank over the modules."""
        return max(pair.rank for pair in self.values())

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module → (m, n)."""
        return {module: pair.shape for module, pair in self.items()}

    @property
    def parameters(self) -> int:
        """Number of LoRA parameters, Σ r(m+n)."""
        return sum(pair.A.numel() + pair.B.numel() for pair in self.values())

    def map(self, change: Callable[[LoraPair], LoraPair]) -> "Adapter":
        """Return the adapter with `change` applied to every pair."""
        return Adapter({module: change(pair) for module, pair in self.items()})

    def with_scale(self, scale: float) -> "Adapter":
        """Return the same products, all at one scale."""
        return self.map(lambda pair: pair.with_scale(scale))

    def to(self, dtype: torch.dtype) -> "Adapter":
        """Return the adapter in another dtype."""
        return self.map(lambda pair: LoraPair(pair.A.to(dtype), pair.B.to(dtype), pair.scale))

    def truncate(self, rank: int) -> "Adapter":
        """Return the first `rank` rank indices of every module."""
        return self.map(lambda pair: pair.truncate(rank))

    @property
    def norm_squared(self) -> float:
        """Σ ‖s·B·A‖_F², summed over the modules."""
        return sum(product.norm() ** 2 for product in self.products().values())

    def energy_by_rank(self) -> Tensor:
        """Return Σ ‖s·b_j·a_j‖_F² over the modules for each rank index j: (R,), float64.

        Averaging with zeros drains the energy of an index that only some clients hold: the "rank collapse" of raFLoRA
        (2602.13486).
        """
        energy = torch.zeros(self.rank, dtype=torch.float64)
        for pair in self.values():
            size = pair.scale**2 * pair.B.double().square().sum(0) * pair.A.double().square().sum(1)
            energy[: pair.rank] += size.cpu()
        return energy

    def products(self) -> dict[str, LowRank]:
        """Return module → s·B·A as a `LowRank`."""
        return {module: pair.product() for module, pair in self.items()}


def draw_A(module: str, rank: int, n: int, seed: int) -> Tensor:
    """Draw A (rank, n) as PEFT initializes it: kaiming-uniform with a = √5, that is U(−1/√n, 1/√n).

    The draw depends only on the seed and the module's name, and its first rows are the same at every rank. A client
    that knows the seed can therefore draw A itself, and a client whose rank is raised draws the rows that the server
    holds.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "lora_A", module))
    return (torch.rand(rank, n, generator=generator) * 2 - 1) / sqrt(n)


def draw_basis(module: str, m: int, rank: int, seed: int) -> Tensor:
    """Draw an (m, rank) matrix with orthonormal columns. It depends only on the seed and the module's name.

    Raises:
        FedeltaError: if the rank exceeds m.
    """
    if rank > m:
        raise FedeltaError(
            f"module {module}: a core of rank {rank} needs a layer with at least {rank} outputs, not {m}"
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, "lora_B", module))
    Q, R = torch.linalg.qr(torch.randn(m, rank, generator=generator, dtype=torch.float64))
    # QR is unique only up to signs, and libraries choose them differently.
    return (Q * torch.sign(R.diagonal())).float()


def initial_adapter(shapes: Shapes, rank: int, seed: int) -> Adapter:
    """Return the adapter of a fresh start: A drawn from the seed, B zero, scale 1. Its product is zero."""
    return Adapter({m: LoraPair(draw_A(m, rank, n, seed), torch.zeros(out, rank)) for m, (out, n) in shapes.items()})


def finite(tensor: Tensor) -> bool:
    """Return True if a tensor contains neither NaN nor infinity."""
    # A sum is seven times as fast as a mask. A finite sum has finite terms only; any other sum may be an overflow of
    # finite terms, so the terms themselves are checked.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
