"""Frobenius norms of sums of products U·V, computed from Gram matrices of their factors."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def norms(terms: Sequence[tuple[Tensor, Tensor]], *columns: Tensor) -> list[float]:
    """Return ‖U·diag(d)·V‖_F for each d, where U·V is a sum of products: ‖·‖² = Σ (UᵀU ∘ VVᵀ ∘ ddᵀ).

    The Gram matrices have the dtype of the factors, which is precise enough if the terms do not cancel. If they do
    cancel (clients that agree), the norm is computed by QR of U in float64, which keeps its digits.

    Args:
        terms: pairs (U_i, V_i) with U = [U_1 …] and V = [V_1; …], of shapes (m, q_i) and (q_i, n) and one dtype. They
            are stacked only if they cancel.
        columns: the vectors d, each (Σ q_i,).
    """
    if sum(U.shape[1] for U, _ in terms) == 0:
        return [0.0 for _ in columns]
    weights = (gram([U for U, _ in terms]) * gram([V.T for _, V in terms])).double()
    result = []
    for d in columns:
        d = d.double()
        square, size = float(d @ weights @ d), float((weights.diagonal() * d.square()).sum())
        # Orthogonal terms have square = size. A square of a thousandth of size has lost half of its digits.
        if square > len(d) * torch.finfo(terms[0][0].dtype).eps ** 0.5 * size:
            result.append(square**0.5)
        else:
            U, V = torch.cat([U for U, _ in terms], dim=1), torch.cat([V for _, V in terms])
            core = torch.linalg.qr(U.double() * d, mode="r").R
            result.append(float(torch.linalg.norm(core @ V.double())))
    return result


def gram(blocks: Sequence[Tensor]) -> Tensor:
    """Return XᵀX of X = [blocks], (q, q), without concatenating X.

    Only products on and above the diagonal are computed. Wide blocks are split, so that more products lie below the
    diagonal; this saves a quarter of the time.
    """
    blocks = [part for block in blocks for part in block.split(max(48, -(-block.shape[1] // 4)), dim=1)]
    ends = list(accumulate(part.shape[1] for part in blocks))
    result = blocks[0].new_empty(ends[-1], ends[-1])
    for i, left in enumerate(blocks):
        rows = slice(ends[i] - left.shape[1], ends[i])
        for j, right in enumerate(blocks[i:], i):
            columns = slice(ends[j] - right.shape[1], ends[j])
            product = left.T @ right
            result[rows, columns] = product
            result[columns, rows] = product.T
    return result
