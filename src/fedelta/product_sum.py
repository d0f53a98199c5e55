"""A running sum of low-rank products, in memory that does not grow with the number of terms."""

import torch
from torch import Tensor

from fedelta.lowrank import Dense, LowRank, Product

CHUNK = 256
"""Inner size at which one GEMM into a dense sum runs at the machine's peak."""


class ProductSum:
    """Σ U_i·V_i: stacked factors while those are smaller than the m×n matrix, then that matrix.

    Args:
        shape: (m, n).
        dtype: of the factors and of the dense sum.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._width = 0
        self._dense: Tensor | None = None

    def add(self, Ut: Tensor, V: Tensor) -> None:
        """Add Utᵀ·V. Factors come with the rank index first, so that stacking them is one copy.

        Args:
            Ut: shape (q, m).
            V: shape (q, n).
        """
        if len(V) == 0:
            return
        self._rows.append((Ut.to(self.dtype), V.to(self.dtype)))
        self._width += len(V)
        m, n = self.shape
        if self._dense is None and self._width * (m + n) > m * n:
            self._dense = torch.zeros(m, n, dtype=self.dtype)
        if self._dense is not None and self._width >= CHUNK:
            self._flush(self._dense)

    def _stacked(self) -> LowRank:
        if not self._rows:
            return LowRank.zero(self.shape, self.dtype)
        Ut, V = (torch.cat([row[i] for row in self._rows]) for i in (0, 1))
        return LowRank(Ut.T, V)

    def _flush(self, dense: Tensor) -> None:
        self._stacked().add_to(dense)
        self._rows, self._width = [], 0

    def value(self, scale: float = 1.0) -> Product:
        """scale·Σ U_i·V_i; the sum itself is used up."""
        if self._dense is None:
            stacked = self._stacked()
            self._rows = []
            stacked.U.mul_(scale)
            return stacked
        self._flush(self._dense)
        return Dense(self._dense.mul_(scale))
