"""`LowRank`: a matrix kept as the product of a tall and a wide factor, and never written out.

Server mathematics is sums, norms and truncations of such products. None of them needs the
m×n matrix: sums stack the factors, norms and truncations go through QR of the factors and a small core.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
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
    def nbytes(self) -> int:
        """Bytes of the two factors."""
        return self.U.nbytes + self.V.nbytes

    @staticmethod
    def sum(terms: Iterable["LowRank"]) -> "LowRank":
        """Σ U_i·V_i = [U_1 … U_K]·[V_1; …; V_K], of width Σ q_i."""
        terms = list(terms)
        return LowRank(torch.cat([t.U for t in terms], dim=1), torch.cat([t.V for t in terms], dim=0))

    @staticmethod
    def from_dense(matrix: Tensor) -> "LowRank":
        """A dense (m, n) matrix as a product of width min(m, n), without any arithmetic."""
        m, n = matrix.shape
        if m <= n:
            return LowRank(torch.eye(m, dtype=matrix.dtype), matrix)
        return LowRank(matrix, torch.eye(n, dtype=matrix.dtype))

    def scaled(self, factor: float) -> "LowRank":
        """factor·U·V."""
        return LowRank(self.U * factor, self.V)

    def to(self, dtype: torch.dtype) -> "LowRank":
        """The same product with factors of another dtype."""
        return LowRank(self.U.to(dtype), self.V.to(dtype))

    def norm(self) -> float:
        """‖U·V‖_F in float64.

        Through QR of U rather than the traces tr((UᵀU)(VVᵀ)): a sum that nearly cancels (the deviation of
        clients that agree) keeps its digits, where the traces are noise below 1e-8 of the largest term.
        """
        if self.width == 0:
            return 0.0
        core = torch.linalg.qr(self.U.double(), mode="r").R
        return float(torch.linalg.norm(core @ self.V.double()))

    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular vectors and values of U·V in float64: (m, k), (k,), (k, n) with k ≤ min(q, m, n)."""
        Qu, Ru = torch.linalg.qr(self.U.double())
        Qv, Rv = torch.linalg.qr(self.V.double().T)
        left, sigma, right = torch.linalg.svd(Ru @ Rv.T, full_matrices=False)
        return Qu @ left, sigma, right @ Qv.T

    def _keep(self, left: Tensor, sigma: Tensor, right: Tensor, rank: int) -> "LowRank":
        root = sigma[:rank].sqrt()
        U, V = left[:, :rank] * root, root[:, None] * right[:rank]
        return LowRank(U.to(self.U.dtype).contiguous(), V.to(self.V.dtype).contiguous())

    def truncate(self, rank: int) -> "LowRank":
        """The best approximation of at most this rank (Eckart–Young), with balanced factors U√Σ and √ΣVᵀ."""
        return self._keep(*self._svd(), rank)

    def recompress(self) -> "LowRank":
        """The same matrix at its numerical rank, with balanced factors.

        Drops singular values below the rounding of the largest one in the dtype of the factors.
        """
        left, sigma, right = self._svd()
        floor = torch.finfo(self.U.dtype).eps * sigma[0] if len(sigma) else 0.0
        return self._keep(left, sigma, right, int((sigma > floor).sum()))

    def add_to(self, weight: Tensor) -> None:
        """weight += U·V in place, as one GEMM without an m×n temporary.

        Raises:
            ValueError: if the shapes differ, or if the weight has fewer bits than the factors. A bf16 weight
                loses most of a small residual: fold into an fp32 patch instead.
        """
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"cannot add a {self.shape} product to a {tuple(weight.shape)} weight")
        if torch.finfo(weight.dtype).bits < torch.finfo(self.U.dtype).bits:
            raise ValueError(f"adding {self.U.dtype} factors to a {weight.dtype} weight would round them away")
        weight.addmm_(self.U.to(weight.dtype), self.V.to(weight.dtype))
