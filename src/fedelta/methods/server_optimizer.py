"""The server's optimizer: the change of the factors as a pseudo-gradient (FedOpt, Reddi et al., 2003.00295).

    Δ = aggregate − previous,  m ← β₁m + Δ,               x ← x + η m              (FedAvgM)
                               m ← β₁m + (1 − β₁)Δ,
                               v ← β₂v + (1 − β₂)Δ²,      x ← x + η m/(√v + τ)     (FedAdam)

for every A and B, with β₂ = 0.99 and τ = 1e-3 as in the paper's experiments. Patches of the base are left alone.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fedelta.lora.adapter import Adapter, LoraPair

if TYPE_CHECKING:
    from fedelta.methods.method import Method, MethodState

ServerOptimizer = Literal["none", "fedavgm", "fedadam"]
BETA_2, TAU = 0.99, 1e-3
MOMENTS = "optimizer"


def optimize(method: "Method", before: "MethodState", after: "MethodState") -> "MethodState":
    """The state with its factors moved by the optimizer, whose moments are in the memory."""
    memory = dict(after.memory)

    def move(key: str, old: Tensor, new: Tensor) -> Tensor:
        delta = new - old
        m = memory.get(f"{MOMENTS}/m/{key}", torch.zeros_like(old))
        beta, rate = method.server_momentum, method.server_learning_rate
        if method.server_optimizer == "fedavgm":
            memory[f"{MOMENTS}/m/{key}"] = m = beta * m + delta
            return old + rate * m
        v = memory.get(f"{MOMENTS}/v/{key}", torch.zeros_like(old))
        memory[f"{MOMENTS}/m/{key}"] = m = beta * m + (1 - beta) * delta
        memory[f"{MOMENTS}/v/{key}"] = v = BETA_2 * v + (1 - BETA_2) * delta.square()
        return old + rate * m / (v.sqrt() + TAU)

    pairs = {
        module: LoraPair(
            move(f"A/{module}", before.adapter[module].A, pair.A), move(f"B/{module}", before.adapter[module].B, pair.B)
        )
        for module, pair in after.adapter.items()
    }
    return replace(after, adapter=Adapter(pairs), memory=memory)
