"""Balanced factors of an SVD, shared by the methods whose adapter comes from one."""

import torch

from fedelta.lora.adapter import LoraPair, draw_A
from fedelta.lora.lowrank import SVD


def balanced_pair(svd: SVD, before: LoraPair, module: str, seed: int) -> LoraPair:
    """Return U√Σ and √ΣVᵀ at the rank of `before`. Directions without energy get a drawn row of A and B = 0.

    Args:
        svd: SVD of the product.
        before: previous pair of the module, which gives rank and dtype.
        module: name of the module, for the draw of A.
        seed: seed of the draw.
    """
    rank, dtype = before.rank, before.B.dtype
    width = min(svd.rank(dtype), rank)
    top = svd.cut(0, width, dtype)
    A = draw_A(module, rank, before.shape[1], seed).to(dtype)
    A[:width] = top.V
    return LoraPair(A, torch.nn.functional.pad(top.U, (0, rank - width)))
