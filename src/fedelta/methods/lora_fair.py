"""LoRA-FAIR (Bian et al., 2411.14961): B̄ is corrected so that B̄Ā is closer to the mean product.

    ΔB = argmin ‖Σ p_i s_i B_i A_i − (B̄ + ΔB) Ā‖² + λ‖ΔB‖² = ΔW_res Āᵀ (ĀĀᵀ + λI)⁻¹

ΔW_res is the covariance of the factors (docs/methods.md 2), so the systems are r×r and no dense matrix is needed.
Clients start from Ā and B̄ + ΔB. Equal ranks only.

The paper compares the two products by their cosine and minimizes by gradient descent on the server, with λ = 0.01. Here
the distance is the squared Frobenius norm, which also measures the size of the product and has this closed form, with
the same λ.
"""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field

from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.lowrank import LowRank
from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState


@register
class LoRAFAIR(Method):
    """LoRA-FAIR.

    Args:
        regularization: λ, the weight of ‖ΔB‖².
    """

    regularization: Annotated[float, Field(ge=0)] = 0.01

    name = "lora-fair"
    paper = "LoRA-FAIR, arXiv 2411.14961"
    summary = "mean of the factors, with B corrected toward the mean product"
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
            # A pseudo-inverse, because λ may be 0 and the rows of Ā may be linearly dependent.
            correction = projected @ torch.linalg.pinv(gram, hermitian=True)
            pairs[module] = LoraPair(mean.A, (mean.B.double() + correction).to(mean.B.dtype))
        return replace(state, adapter=Adapter(pairs)), {}
