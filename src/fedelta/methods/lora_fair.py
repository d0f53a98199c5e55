"""LoRA-FAIR (Bian et al., 2411.14961): B̄ is corrected so that B̄Ā comes closer to the mean product.

    ΔB = argmin ‖Σ p_i s_i B_i A_i − (B̄ + ΔB) Ā‖² + λ‖ΔB‖² = ΔW_res Āᵀ (ĀĀᵀ + λI)⁻¹

with ΔW_res the covariance of the factors (docs/methods.md 2): r×r systems, nothing dense. Clients start from Ā and
B̄ + ΔB. Equal ranks.

The paper compares the two products by their cosine and descends on the server, with λ = 0.01. We take the squared
Frobenius distance, which measures the size of the product too, has this closed form, and the same λ.
"""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field

from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.lowrank import LowRank
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState, Patch


@register
class LoRAFAIR(Method):
    """Options: λ, how much a large correction costs."""

    regularization: Annotated[float, Field(ge=0)] = 0.01

    name = "lora-fair"
    paper = "LoRA-FAIR, arXiv 2411.14961"
    summary = "mean of the factors, B corrected towards the mean product"
    mixed_ranks = False

    properties = Properties()
    covariance = "total"

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        pairs = {}
        for module, mean in moments.means().items():
            residual, A = moments.covariance(module), mean.A.double()
            gram = A @ A.T + self.regularization * torch.eye(mean.rank, dtype=torch.float64)
            if isinstance(residual, LowRank):
                projected = residual.U.double() @ (residual.V.double() @ A.T)
            else:
                projected = residual.W.double() @ A.T
            # The pseudo-inverse, because λ = 0 is allowed and Ā may have rows that depend on each other.
            correction = projected @ torch.linalg.pinv(gram, hermitian=True)
            pairs[module] = LoraPair(mean.A, (mean.B.double() + correction).to(mean.B.dtype))
        return replace(state, adapter=Adapter(pairs)), {}
