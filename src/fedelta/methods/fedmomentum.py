"""FedMomentum (2603.08014): the strongest directions go on training, the next ones into the base.

    Σ p_i s_i B_i A_i = U Σ Vᵀ
    adapter:  B = U_R√Σ_R,  A = √Σ_R V_Rᵀ
    base:     W0 ← W0 + U_{R:q} Σ_{R:q} V_{R:q}ᵀ,      q = least with Σ_{k≤q} σ_k² ≥ τ Σ σ_k²

What is beyond q is dropped. The abstract says that the dominant components rebuild LoRA at the same rank and that the
residual can go into the backbone; the balanced split and τ = 0.9999 follow a public reimplementation. Equal ranks.
"""

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from fedelta.lora.adapter import Adapter
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.balanced_pair import balanced_pair
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState, Patch


@register
class FedMomentum(Method):
    """Options: τ, the share of Σσ² that adapter and base keep together; 1 is exact."""

    energy: Annotated[float, Field(gt=0, le=1)] = 0.9999

    name = "fedmomentum"
    paper = "FedMomentum, arXiv 2603.08014"
    summary = "SVD of the mean product: the top R to the adapter, the rest of the energy to the base"
    mixed_ranks = False
    properties = Properties(gauge_invariant="always")
    covariance = "total"
    keeps_basis = False
    variants = ({"energy": 1.0},)

    def holds(self) -> Properties:
        return self.properties._replace(exact="always" if self.energy == 1 else "never")

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        pairs, patch = {}, Patch()
        for module, before in state.adapter.items():
            product = moments.mean_product(module)
            svd = product.svd()
            pairs[module] = balanced_pair(svd, before, module, state.seed)
            q = min(svd.energy_rank(self.energy), svd.rank(product.dtype))
            if q > before.rank:
                patch[module] = svd.cut(before.rank, q, product.dtype)
        return replace(state, adapter=Adapter(pairs)), patch
