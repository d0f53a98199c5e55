"""`LowRank`: a matrix stored as the product of a tall and a wide factor, without forming the product.

The server computes sums, norms and truncations of such products without the m×n matrix: sums stack the factors; norms
and truncations use small Gram matrices or QR. `Dense` stores the m×n matrix, for sums so wide that it is smaller.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedelta.lora.gram import gram, norms


@dataclass(frozen=True, eq=False)
class SVD:
    """SVD left·diag(sigma)·right. Singular vectors are combinations of stored columns and rows; `cut` forms them.

    Args:
        sigma: singular values, (k,), descending, float64.
        U, left_of_U: (m, q) and (q, k), with left = U·left_of_U; None stands for the identity.
        V, right_of_V: (q, n) and (k, q), with right = right_of_V·V; None stands for the identity.
    """

    sigma: Tensor
    U: Tensor
    left_of_U: Tensor | None
    V: Tensor
    right_of_V: Tensor | None

    def rank(self, dtype: torch.dtype) -> int:
        """Return the number of singular values above the rounding error of the largest one in this dtype."""
        if len(self.sigma) == 0:
            return 0
        return int((self.sigma > torch.finfo(dtype).eps * self.sigma[0]).sum())

    def energy_rank(self, energy: float) -> int:
        """Return the smallest number of leading singular values with this share of Σσ²; 0 for a zero matrix."""
        total = self.sigma.square().cumsum(0)
        if len(total) == 0 or total[-1] == 0:
            return 0
        return min(int((total < energy * total[-1]).sum()) + 1, len(total))

    def cut(self, begin: int, end: int | None, dtype: torch.dtype) -> "LowRank":
        """Return the components `begin` to `end` (exclusive) with balanced factors U√Σ and √ΣVᵀ."""
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
    """Interface shared by `LowRank` and `Dense`."""

    @abstractmethod
    def svd(self) -> SVD:
        """Return the singular value decomposition."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the stored tensors."""

    @abstractmethod
    def add_to(self, weight: Tensor) -> None:
        """Add the matrix to `weight` (m, n) in place."""

    def truncate(self, rank: int) -> "LowRank":
        """Return the best approximation of at most this rank (Eckart–Young), with balanced factors U√Σ and √ΣVᵀ."""
        return self.svd().cut(0, rank, self.dtype)

    def recompress(self) -> "LowRank":
        """Return the matrix at its numerical rank (`SVD.rank` in the dtype of the factors), with balanced factors."""
        svd = self.svd()
        return svd.cut(0, svd.rank(self.dtype), self.dtype)


@dataclass(frozen=True, eq=False)
class LowRank(Matrix):
    """The matrix U·V, stored as its factors.

    Args:
        U: left factor, shape (m, q).
        V: right factor, shape (q, n), of the same dtype.

    Raises:
        ValueError: if the inner sizes differ.

    Example:
        >>> u, v = torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, 0.0]])
        >>> total = LowRank.sum([LowRank(u, v), LowRank(u, v)])
        >>> total.shape, total.width, round(total.norm(), 6)
        ((2, 2), 2, 10.0)
        >>> total.recompress().width
        1
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
        """Inner size q, an upper bound on the rank."""
        return self.U.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.U.dtype

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The factors by name, as files and messages store them."""
        return {"U": self.U, "V": self.V}

    @property
    def nbytes(self) -> int:
        """Size of the two factors in bytes."""
        return self.U.nbytes + self.V.nbytes

    @staticmethod
    def sum(terms: Iterable["LowRank"]) -> "LowRank":
        """Return Σ U_i·V_i = [U_1 … U_K]·[V_1; …; V_K], of width Σ q_i."""
        terms = list(terms)
        return LowRank(torch.cat([t.U for t in terms], dim=1), torch.cat([t.V for t in terms], dim=0))

    def scaled(self, factor: float) -> "LowRank":
        """Return factor·U·V."""
        return self if factor == 1 else LowRank(self.U * factor, self.V)

    def to(self, dtype: torch.dtype) -> "LowRank":
        """Return the same product with factors of another dtype."""
        return LowRank(self.U.to(dtype), self.V.to(dtype))

    def contiguous(self) -> "LowRank":
        """Return the same product with contiguous factors."""
        return LowRank(self.U.contiguous(), self.V.contiguous())

    def is_zero(self) -> bool:
        """Return True if one of the factors is zero."""
        return self.width == 0 or not all(_any(x) for x in (self.U, self.V))

    def norm(self) -> float:
        """Return ‖U·V‖_F without forming the product. The result keeps its digits even if columns cancel."""
        return norms([(self.U, self.V)], torch.ones(self.width))[0]

    def svd(self) -> SVD:
        """Return the SVD of U·V without forming the product; k ≤ min(q, m, n).

        Factors of at most 32 bits use eigenvectors of two q×q Gram matrices in float64: twice as fast as QR and exact
        to 1e-8 of the largest singular value, which is below the rounding error of the factors. Float64 needs QR.
        """
        if self.dtype == torch.float64 or self.width > min(self.shape):
            Qu, Ru = torch.linalg.qr(self.U.double())
            Qv, Rv = torch.linalg.qr(self.V.double().T)
            left, sigma, right = torch.linalg.svd(Ru @ Rv.T, full_matrices=False)
            return SVD(sigma, Qu, left, Qv.T, right)
        gram_U, gram_V = gram([self.U.double()]), gram([self.V.double().T])
        # Columns of U get length one and rows of V take that length: a small column counts by its part of the product.
        length = gram_U.diagonal().sqrt()
        unit = torch.where(length > 0, 1 / length, 0.0)
        gram_U, gram_V = unit[:, None] * gram_U * unit, length[:, None] * gram_V * length
        values, vectors = torch.linalg.eigh(gram_U)
        # Rounding errors in U have no left singular vector; a zero U (B = 0 in round 0) has none at all.
        largest = float(values[-1]) if len(values) else 0.0
        significant = values > max(largest, 0.0) * torch.finfo(torch.float64).eps * self.width
        root, vectors = values[significant].sqrt(), vectors[:, significant]
        # U = (U·vectors/root)·(root·vectorsᵀ), so root·vectorsᵀ·V has the singular values of U·V.
        inner = root[:, None] * vectors.T
        squares, turn = torch.linalg.eigh(inner @ gram_V @ inner.T)
        sigma, turn = squares.clamp(min=0).sqrt().flip(0), turn.flip(1)
        inverse = torch.where(sigma > 0, 1 / sigma, 0.0)
        left = unit[:, None] * ((vectors / root) @ turn)
        return SVD(sigma, self.U, left, self.V, inverse[:, None] * (turn.T @ inner) * length)

    def add_to(self, weight: Tensor) -> None:
        """Add U·V to `weight` (m, n) in place, as one GEMM without an m×n temporary.

        Raises:
            ValueError: if the shapes differ, or if the weight has fewer bits than the factors: a bf16 weight would
                lose most of a small residual. Add it to an fp32 patch instead.
        """
        _check_sum(self, weight)
        weight.addmm_(self.U.to(weight.dtype), self.V.to(weight.dtype))


@dataclass(frozen=True, eq=False)
class Dense(Matrix):
    """A full m×n matrix, the form of a sum of products once its factors would be larger. Methods as in `LowRank`."""

    W: Tensor  # (m, n)

    @property
    def shape(self) -> tuple[int, int]:
        return self.W.shape[0], self.W.shape[1]

    @property
    def width(self) -> int:
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
        """Return the SVD; in fp32 from the smaller Gram matrix in float64, for the reason given in `LowRank.svd`."""
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
        """Return the matrix as a product with the identity of its smaller side, without arithmetic."""
        m, n = self.shape
        identity = torch.eye(min(m, n), dtype=self.dtype)
        return LowRank(identity, self.W) if m <= n else LowRank(self.W, identity)

    def add_to(self, weight: Tensor) -> None:
        _check_sum(self, weight)
        weight += self.W


Product = LowRank | Dense


def _any(x: Tensor) -> bool:
    # The first row usually decides; the whole tensor is read only if that row is zero.
    return bool(x[:1].any()) or bool(x.any())


def from_tensors(tensors: dict[str, Tensor]) -> Product:
    """Return the matrix with these `tensors`: the inverse of `Product.tensors`."""
    return Dense(tensors["W"]) if "W" in tensors else LowRank(tensors["U"], tensors["V"])


def _check_sum(product: Product, weight: Tensor) -> None:
    """Raise if `product` can't be added to `weight` without losing bits."""
    if tuple(weight.shape) != product.shape:
        raise ValueError(f"cannot add a {product.shape} product to a {tuple(weight.shape)} weight")
    if torch.finfo(weight.dtype).bits < torch.finfo(product.dtype).bits:
        raise ValueError(f"adding {product.dtype} factors to a {weight.dtype} weight would round them away")


def add(terms: list[Product]) -> Product:
    """Return the sum of the matrices: dense if one of them is, otherwise low-rank with the sum of all widths."""
    if len(terms) == 1:
        return terms[0]
    dense = [term for term in terms if isinstance(term, Dense)]
    low_rank = [term for term in terms if isinstance(term, LowRank)]
    if not dense:
        return LowRank.sum(low_rank)
    total = dense[0].W.clone()
    for term in [*dense[1:], *low_rank]:
        term.add_to(total)
    return Dense(total)
