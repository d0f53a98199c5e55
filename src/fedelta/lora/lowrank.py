"""`LowRank`: a matrix kept as the product of a tall and a wide factor, and never written out.

Server mathematics is sums, norms and truncations of such products. None of them needs the
m×n matrix: sums stack the factors, norms and truncations go through small Gram matrices or QR of the factors.
`Dense` is the same thing written out, for sums so wide that the m×n matrix is the smaller form.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedelta.lora.gram import gram, norms


@dataclass(frozen=True, eq=False)
class SVD:
    """left·diag(sigma)·right, with singular vectors as combinations of given columns and rows, formed when asked for.

    Args:
        sigma: (k,) descending, float64.
        U, left_of_U: (m, q) and (q, k): left = U·left_of_U; None stands for the identity.
        V, right_of_V: (q, n) and (k, q): right = right_of_V·V; likewise.
    """

    sigma: Tensor
    U: Tensor
    left_of_U: Tensor | None
    V: Tensor
    right_of_V: Tensor | None

    def rank(self, dtype: torch.dtype) -> int:
        """Number of singular values above the rounding of the largest one in this dtype."""
        if len(self.sigma) == 0:
            return 0
        return int((self.sigma > torch.finfo(dtype).eps * self.sigma[0]).sum())

    def energy_rank(self, energy: float) -> int:
        """Fewest leading singular values with at least this share of Σσ²; 0 for a zero matrix."""
        total = self.sigma.square().cumsum(0)
        if len(total) == 0 or total[-1] == 0:
            return 0
        return min(int((total < energy * total[-1]).sum()) + 1, len(total))

    def cut(self, begin: int, end: int | None, dtype: torch.dtype) -> "LowRank":
        """Components begin to end with balanced factors U√Σ and √ΣVᵀ."""
        root = self.sigma[begin:end].sqrt()
        if self.left_of_U is None:
            U = self.U[:, begin:end] * root
        else:
            U = self.U.double() @ (self.left_of_U[:, begin:end] * root)
        if self.right_of_V is None:
            V = root[:, None] * self.V[begin:end]
        else:
            V = (root[:, None] * self.right_of_V[begin:end]) @ self.V.double()
        return LowRank(U.to(dtype).contiguous(), V.to(dtype).contiguous())


class Matrix(ABC):
    """What `LowRank` and `Dense` share."""

    @abstractmethod
    def svd(self) -> SVD:
        """Singular values and vectors."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the tensors that hold it."""

    @abstractmethod
    def add_to(self, weight: Tensor) -> None:
        """weight += this, in place."""

    def truncate(self, rank: int) -> "LowRank":
        """The best approximation of at most this rank (Eckart–Young), with balanced factors U√Σ and √ΣVᵀ."""
        return self.svd().cut(0, rank, self.dtype)

    def recompress(self) -> "LowRank":
        """The same matrix at its numerical rank, with balanced factors.

        Drops singular values below the rounding of the largest one in the dtype of the factors.
        """
        svd = self.svd()
        return svd.cut(0, svd.rank(self.dtype), self.dtype)


@dataclass(frozen=True, eq=False)
class LowRank(Matrix):
    """The matrix U·V.

    Args:
        U: left factor, shape (m, q).
        V: right factor, shape (q, n), of the same dtype.

    Raises:
        ValueError: if the inner sizes differ.
    """

    U: Tensor  # (m, q)
    V: Tensor  # (q, n)

    def __post_init__(self) -> None:
        if self.U.ndim != 2 or self.V.ndim != 2 or self.U.shape[1] != self.V.shape[0]:
            raise ValueError(f"U {tuple(self.U.shape)} and V {tuple(self.V.shape)} do not share an inner size")

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the product."""
        return self.U.shape[0], self.V.shape[1]

    @property
    def width(self) -> int:
        """The inner size q: an upper bound on the rank."""
        return self.U.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.U.dtype

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a file or a message holds of it."""
        return {"U": self.U, "V": self.V}

    @property
    def nbytes(self) -> int:
        """Bytes of the two factors."""
        return self.U.nbytes + self.V.nbytes

    @staticmethod
    def sum(terms: Iterable["LowRank"]) -> "LowRank":
        """Σ U_i·V_i = [U_1 … U_K]·[V_1; …; V_K], of width Σ q_i."""
        terms = list(terms)
        return LowRank(torch.cat([t.U for t in terms], dim=1), torch.cat([t.V for t in terms], dim=0))

    def scaled(self, factor: float) -> "LowRank":
        """factor·U·V."""
        return self if factor == 1 else LowRank(self.U * factor, self.V)

    def to(self, dtype: torch.dtype) -> "LowRank":
        """The same product with factors of another dtype."""
        return LowRank(self.U.to(dtype), self.V.to(dtype))

    def contiguous(self) -> "LowRank":
        """The same product with factors in row order."""
        return LowRank(self.U.contiguous(), self.V.contiguous())

    def is_zero(self) -> bool:
        """Whether a factor holds nothing but zeros."""
        return self.width == 0 or not all(_any(x) for x in (self.U, self.V))

    def norm(self) -> float:
        """‖U·V‖_F, without forming the product; a product that cancels keeps its digits."""
        return norms([(self.U, self.V)], torch.ones(self.width))[0]

    def svd(self) -> SVD:
        """Singular values and vectors of U·V, without forming it; k ≤ min(q, m, n).

        Factors of 32 bits and fewer: eigenvectors of two q×q Gram matrices in float64, twice as fast as QR and exact
        to 1e-8 of the largest singular value, below the rounding of the factors. Factors in float64 need QR.
        """
        if self.dtype == torch.float64 or self.width > min(self.shape):
            Qu, Ru = torch.linalg.qr(self.U.double())
            Qv, Rv = torch.linalg.qr(self.V.double().T)
            left, sigma, right = torch.linalg.svd(Ru @ Rv.T, full_matrices=False)
            return SVD(sigma, Qu, left, Qv.T, right)
        gram_U, gram_V = gram([self.U.double()]), gram([self.V.double().T])
        # Columns of U to length one, rows of V taking their length: a column that is small beside the others counts
        # by its part of the product.
        length = gram_U.diagonal().sqrt()
        unit = torch.where(length > 0, 1 / length, 0.0)
        gram_U, gram_V = unit[:, None] * gram_U * unit, length[:, None] * gram_V * length
        values, vectors = torch.linalg.eigh(gram_U)
        # Directions of U that are rounding have no left singular vector; a zero U (B = 0, round 0) has none at all.
        largest = float(values[-1]) if len(values) else 0.0
        kept = values > max(largest, 0.0) * torch.finfo(torch.float64).eps * self.width
        root, vectors = values[kept].sqrt(), vectors[:, kept]
        # U = (U·vectors/root)·(root·vectorsᵀ), so the core root·vectorsᵀ·V has the singular values of U·V.
        inner = root[:, None] * vectors.T
        squares, turn = torch.linalg.eigh(inner @ gram_V @ inner.T)
        sigma, turn = squares.clamp(min=0).sqrt().flip(0), turn.flip(1)
        inverse = torch.where(sigma > 0, 1 / sigma, 0.0)
        left = unit[:, None] * ((vectors / root) @ turn)
        return SVD(sigma, self.U, left, self.V, inverse[:, None] * (turn.T @ inner) * length)

    def add_to(self, weight: Tensor) -> None:
        """weight += U·V in place, as one GEMM without an m×n temporary.

        Raises:
            ValueError: if the shapes differ, or if the weight has fewer bits than the factors. A bf16 weight
                loses most of a small residual: fold into an fp32 patch instead.
        """
        _check(self, weight)
        weight.addmm_(self.U.to(weight.dtype), self.V.to(weight.dtype))


@dataclass(frozen=True, eq=False)
class Dense(Matrix):
    """An m×n matrix written out: what a sum of products becomes once its factors are larger than that."""

    W: Tensor  # (m, n)

    @property
    def shape(self) -> tuple[int, int]:
        return self.W.shape[0], self.W.shape[1]

    @property
    def width(self) -> int:
        """An upper bound on the rank."""
        return min(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.W.dtype

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"W": self.W}

    @property
    def nbytes(self) -> int:
        return self.W.nbytes

    def scaled(self, factor: float) -> "Dense":
        return self if factor == 1 else Dense(self.W * factor)

    def to(self, dtype: torch.dtype) -> "Dense":
        return Dense(self.W.to(dtype))

    def contiguous(self) -> "Dense":
        return Dense(self.W.contiguous())

    def is_zero(self) -> bool:
        return not _any(self.W)

    def norm(self) -> float:
        return float(torch.linalg.norm(self.W.double()))

    def svd(self) -> SVD:
        """In fp32 by eigenvectors of the smaller Gram matrix in float64, for the reason that `LowRank.svd` gives."""
        if self.dtype == torch.float64:
            left, sigma, right = torch.linalg.svd(self.W, full_matrices=False)
            return SVD(sigma, left, None, right, None)
        wide = self.shape[0] <= self.shape[1]
        squares, vectors = torch.linalg.eigh(gram([(self.W.T if wide else self.W).double()]))
        sigma, vectors = squares.clamp(min=0).sqrt().flip(0), vectors.flip(1)
        inverse = torch.where(sigma > 0, 1 / sigma, 0.0)
        if wide:
            return SVD(sigma, vectors, None, self.W, inverse[:, None] * vectors.T)
        return SVD(sigma, self.W, vectors * inverse, vectors.T, None)

    def as_product(self) -> LowRank:
        """The same matrix as a product with the identity of its smaller side, without any arithmetic."""
        m, n = self.shape
        one = torch.eye(min(m, n), dtype=self.dtype)
        return LowRank(one, self.W) if m <= n else LowRank(self.W, one)

    def add_to(self, weight: Tensor) -> None:
        _check(self, weight)
        weight += self.W


Product = LowRank | Dense


def _any(x: Tensor) -> bool:
    # A row tells in most cases; all of it is looked at only where that row is zero.
    return bool(x[:1].any()) or bool(x.any())


def from_tensors(tensors: dict[str, Tensor]) -> Product:
    """The matrix whose `tensors` these are."""
    return Dense(tensors["W"]) if "W" in tensors else LowRank(tensors["U"], tensors["V"])


def _check(product: Product, weight: Tensor) -> None:
    if tuple(weight.shape) != product.shape:
        raise ValueError(f"cannot add a {product.shape} product to a {tuple(weight.shape)} weight")
    if torch.finfo(weight.dtype).bits < torch.finfo(product.dtype).bits:
        raise ValueError(f"adding {product.dtype} factors to a {weight.dtype} weight would round them away")


def add(terms: list[Product]) -> Product:
    """The sum of some matrices: dense if one of them is, else of the width of all."""
    if len(terms) == 1:
        return terms[0]
    dense = [term for term in terms if isinstance(term, Dense)]
    low = [term for term in terms if isinstance(term, LowRank)]
    if not dense:
        return LowRank.sum(low)
    total = dense[0].W.clone()
    for term in [*dense[1:], *low]:
        term.add_to(total)
    return Dense(total)
