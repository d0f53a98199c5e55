"""Running sum of low-rank products around a shift. Its memory does not grow with the number of terms."""

import torch
from torch import Tensor

from fedelta.lora.lowrank import Dense, LowRank, Product

CHUNK = 256
"""Inner size at which one GEMM into a dense sum reaches the peak speed of the hardware."""


class RunningSum:
    """Σ_i w_i (b_i − δ)·a_i, kept as stacked factors while those are smaller than the m×n matrix, then as that matrix.

    The shift δ is known only at the end. Stacked factors are then corrected in place. Terms that are folded into the
    dense matrix earlier are corrected by the mean δ′ of the first fold, so the remaining correction
    (δ − δ′)·Σ w_i a_i is small.

    Args:
        shape: (m, n).
        dtype: dtype of the factors and of the dense sum.
        columns: R, the number of columns of δ.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, columns: int) -> None:
        self.shape = shape
        self.dtype = dtype
        self._columns = columns
        self._terms: list[tuple[Tensor, Tensor, float, Tensor | slice]] = []
        self._width = 0
        self._dense: Tensor | None = None
        self._shift: Tensor | None = None

    def add(self, b: Tensor, a: Tensor, weight: float, columns: Tensor | slice) -> None:
        """Add weight·b·a.

        Args:
            b: shape (m, q). Kept by reference, not copied.
            a: shape (q, n). Kept by reference, not copied.
            weight: w_i.
            columns: the columns of δ that belong to the columns of b.
        """
        if len(a) == 0:
            return
        self._terms.append((b, a, weight, columns))
        self._width += len(a)
        m, n = self.shape
        if self._dense is None and self._width * (m + n) > m * n:
            self._dense = torch.zeros(m, n, dtype=self.dtype)
        if self._dense is not None and self._width >= CHUNK:
            self._fold(self._dense)

    def _stacked(self, scale: float, shift: Tensor) -> LowRank:
        """Return scale·Σ w_i (b_i − shift)·a_i over the pending terms as one product, and clear them."""
        U = torch.empty(self.shape[0], self._width, dtype=self.dtype)
        end = 0
        for b, a, weight, columns in self._terms:
            begin, end = end, end + len(a)
            torch.sub(b, shift[:, columns], out=U[:, begin:end]).mul_(weight * scale)
        V = torch.cat([torch.empty(0, self.shape[1], dtype=self.dtype), *(a for _, a, _, _ in self._terms)])
        self._terms, self._width = [], 0
        return LowRank(U, V)

    def _fold(self, dense: Tensor) -> Tensor:
        """Add the pending terms to the dense sum, corrected by δ′; return δ′."""
        if self._shift is None:
            total = torch.zeros(self.shape[0], self._columns, dtype=torch.float64)
            mass = torch.zeros(self._columns, dtype=torch.float64)
            for b, _, weight, columns in self._terms:
                total[:, columns] += weight * b
                mass[columns] += weight
            self._shift = (total / mass.clamp(min=1e-300)).to(self.dtype)
        self._stacked(1.0, self._shift).add_to(dense)
        return self._shift

    def value(self, scale: float, shift: Tensor, total_a: Tensor, span: slice) -> Product:
        """Return scale·Σ w_i (b_i − δ)·a_i. The sum is consumed and cannot be used afterwards.

        Args:
            scale: factor of the whole sum.
            shift: δ, (m, R).
            total_a: Σ w_i a_i over all terms, one row for each column of δ, (R, n).
            span: the columns of δ that occur in this sum.
        """
        if self._dense is None:
            return self._stacked(scale, shift.to(self.dtype))
        correction = (self._fold(self._dense).double() - shift)[:, span]
        LowRank(correction, total_a[span]).to(self.dtype).add_to(self._dense)
        return Dense(self._dense.mul_(scale))
