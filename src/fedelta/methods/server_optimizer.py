"""Server optimizers, with the change of the factors as a pseudo-gradient (FedOpt, Reddi et al., 2003.00295).

    Δ = aggregate − previous,  m ← β₁m + Δ,               x ← x + η m              (FedAvgM)
                               m ← β₁m + (1 − β₁)Δ,
                               v ← β₂v + (1 − β₂)Δ²,      x ← x + η m/(√v + τ)     (FedAdam)

They update every A and B, with β₂ = 0.99 and τ = 1e-3 as in the paper's experiments. Base patches do not change.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fedelta.lora.adapter import Adapter, LoraPair

ServerOptimizer = Literal["none", "fedavgm", "fedadam"]
BETA_2, TAU = 0.99, 1e-3
MOMENTS = "optimizer"
"""Prefix of the names of the moments in a method's memory."""


def optimize(
    before: Adapter, after: Adapter, memory: Mapping[str, Tensor], kind: ServerOptimizer, rate: float, momentum: float
) -> tuple[Adapter, dict[str, Tensor]]:
    """Run one step of a server optimizer.

    Args:
        before: adapter that was broadcast.
        after: aggregate of the clients' adapters.
        memory: the method's memory, with the moments under names that begin with `MOMENTS`.
        kind: `fedavgm` or `fedadam`.
        rate: η.
        momentum: β₁.

    Returns:
        The adapter after the step, and the memory with the new moments.
    """
    memory = dict(memory)

    def move(key: str, old: Tensor, new: Tensor) -> Tensor:
        delta = new - old
        m = memory.get(f"{MOMENTS}/m/{key}", torch.zeros_like(old))
        if kind == "fedavgm":
            memory[f"{MOMENTS}/m/{key}"] = m = momentum * m + delta
            return old + rate * m
        v = memory.get(f"{MOMENTS}/v/{key}", torch.zeros_like(old))
        memory[f"{MOMENTS}/m/{key}"] = m = momentum * m + (1 - momentum) * delta
        memory[f"{MOMENTS}/v/{key}"] = v = BETA_2 * v + (1 - BETA_2) * delta.square()
        return old + rate * m / (v.sqrt() + TAU)

    pairs = {
        module: LoraPair(move(f"A/{module}", before[module].A, pair.A), move(f"B/{module}", before[module].B, pair.B))
        for module, pair in after.items()
    }
    return Adapter(pairs), memory
