"""LoRA pairs and adapters. **The only place where α/r exists.**

One adapted layer has the update ΔW = s·B·A with B (m, r), A (r, n) and s = α/r, or α/√r for rsLoRA
(Kalajdzievski 2312.03732). Everything outside this file works with `LoraPair.scale` and never computes it.
Shapes are those of the layer as a Linear, out×in; a Conv1D (`fan_in_fan_out`) is turned by whoever touches
its weight.
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
    """The factor s of s·B·A: α/r (LoRA), α/√r (rsLoRA), or α whatever the rank."""
    if rank < 1:
        raise FedeltaError(f"a LoRA rank is at least 1, found {rank}")
    return {"alpha/r": alpha / rank, "alpha/sqrt(r)": alpha / sqrt(rank), "alpha": alpha}[rule]


def lora_alpha(scale: float, rank: int, rule: ScaleRule = "alpha/r") -> float:
    """The α that gives this scale at this rank: what an adapter's config must say."""
    return scale / lora_scale(1.0, rank, rule)


@dataclass(frozen=True, eq=False)
class LoraPair:
    """The update s·B·A of one layer.

    Args:
        A: shape (r, n).
        B: shape (m, r).
        scale: s.
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
        """s·B·A as a `LowRank` of width r."""
        return LowRank(self.B * self.scale, self.A)

    def with_scale(self, scale: float) -> "LoraPair":
        """The same product under another scale: B·(s/scale). Scale 1 absorbs s into B."""
        if scale == self.scale:
            return self
        return LoraPair(self.A, self.B * (self.scale / scale), scale)

    def select(self, indices: Tensor) -> "LoraPair":
        """These rank indices alone."""
        return LoraPair(self.A[indices].contiguous(), self.B[:, indices].contiguous(), self.scale)

    def truncate(self, rank: int) -> "LoraPair":
        """The first `rank` columns of B and rows of A: what a client of that rank downloads."""
        return LoraPair(self.A[:rank].contiguous(), self.B[:, :rank].contiguous(), self.scale)


@dataclass(frozen=True, eq=False)
class Adapter(Mapping[str, LoraPair]):
    """A LoRA adapter: module name → `LoraPair`, in a fixed order of names."""

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
        """The largest rank of any module."""
        return max(pair.rank for pair in self.values())

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {module: pair.shape for module, pair in self.items()}

    @property
    def parameters(self) -> int:
        """Number of LoRA parameters, Σ r(m+n)."""
        return sum(pair.A.numel() + pair.B.numel() for pair in self.values())

    def map(self, change: Callable[[LoraPair], LoraPair]) -> "Adapter":
        """The adapter with every pair changed."""
        return Adapter({module: change(pair) for module, pair in self.items()})

    def with_scale(self, scale: float) -> "Adapter":
        """The same products under one scale."""
        return self.map(lambda pair: pair.with_scale(scale))

    def to(self, dtype: torch.dtype) -> "Adapter":
        """The same adapter in another dtype."""
        return self.map(lambda pair: LoraPair(pair.A.to(dtype), pair.B.to(dtype), pair.scale))

    def truncate(self, rank: int) -> "Adapter":
        """The first `rank` rank indices of every module."""
        return self.map(lambda pair: pair.truncate(rank))

    @property
    def norm_squared(self) -> float:
        """Σ ‖s·B·A‖_F² over the modules."""
        return sum(product.norm() ** 2 for product in self.products().values())

    def energy_by_rank(self) -> Tensor:
        """Σ ‖s·b_j·a_j‖_F² over the modules, of each rank index j: (R,), float64. An index that only some clients have
        loses it where they are averaged with zeros («rank collapse», raFLoRA, 2602.13486)."""
        energy = torch.zeros(self.rank, dtype=torch.float64)
        for pair in self.values():
            size = pair.scale**2 * pair.B.double().square().sum(0) * pair.A.double().square().sum(1)
            energy[: pair.rank] += size.cpu()
        return energy

    def products(self) -> dict[str, LowRank]:
        return {module: pair.product() for module, pair in self.items()}


def draw_A(module: str, rank: int, n: int, seed: int) -> Tensor:
    """A (rank, n) as PEFT initializes it: kaiming-uniform with a = √5, that is U(−1/√n, 1/√n).

    Depends on the seed and the module's name alone, and its first rows are the same at every rank: a client
    that knows the seed draws its own A, and a promoted client's new rows are those that the server holds.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "lora_A", module))
    return (torch.rand(rank, n, generator=generator) * 2 - 1) / sqrt(n)


def draw_basis(module: str, m: int, rank: int, seed: int) -> Tensor:
    """An (m, rank) matrix with orthonormal columns that depends on the seed and the module's name alone.

    Raises:
        FedeltaError: if the rank exceeds m.
    """
    if rank > m:
        raise FedeltaError(f"module {module}: a core of rank {rank} needs a layer of at least as many outputs, not {m}")
    generator = torch.Generator().manual_seed(derive_seed(seed, "lora_B", module))
    Q, R = torch.linalg.qr(torch.randn(m, rank, generator=generator, dtype=torch.float64))
    # QR is unique up to signs, and libraries differ in them.
    return (Q * torch.sign(R.diagonal())).float()


def initial_adapter(shapes: Shapes, rank: int, seed: int) -> Adapter:
    """A drawn from the seed, B zero, scale 1: the product is zero."""
    return Adapter({m: LoraPair(draw_A(m, rank, n, seed), torch.zeros(out, rank)) for m, (out, n) in shapes.items()})


def finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    # A sum is seven times as fast as a mask and finite only if every term is (or on overflow: then look).
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
