"""A product factored anew with balanced factors, shared by the methods that send an SVD."""

import torch

from fedelta.lora.adapter import LoraPair, draw_A
from fedelta.lora.lowrank import SVD


def balanced_pair(svd: SVD, before: LoraPair, module: str, seed: int) -> LoraPair:
    """U√Σ and √ΣVᵀ at the rank of `before`; directions without energy get A as drawn and B zero."""
    rank, dtype = before.rank, before.B.dtype
    kept = min(svd.rank(dtype), rank)
    top = svd.cut(0, kept, dtype)
    A = draw_A(module, rank, before.shape[1], seed).to(dtype)
    A[:kept] = top.V
    return LoraPair(A, torch.nn.functional.pad(top.U, (0, rank - kept)))
