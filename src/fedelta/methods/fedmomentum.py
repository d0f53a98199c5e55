"""FedMomentum (2603.08014): the strongest directions stay in the adapter, the next ones are added to the base.

    Σ p_i s_i B_i A_i = U Σ Vᵀ
    adapter:  B = U_R√Σ_R,  A = √Σ_R V_Rᵀ
    base:     W0 ← W0 + U_{R:q} Σ_{R:q} V_{R:q}ᵀ,      q = smallest with Σ_{k≤q} σ_k² ≥ τ Σ σ_k²

Components beyond q are dropped. The paper's abstract says that the dominant components rebuild LoRA at the same rank
and that the residual can be added to the backbone. The balanced split and τ = 0.9999 follow a public reimplementation.
Equal ranks only.
"""

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.lowrank import Product
from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.balanced_pair import balanced_pair
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState


@register
class FedMomentum(Method):
    """FedMomentum.

    Args:
        energy: τ, the share of Σσ² that adapter and base keep together, in (0, 1]; 1 is exact.
    """

    energy: Annotated[float, Field(gt=0, le=1)] = 0.9999

    name = "fedmomentum"
    paper = "FedMomentum, arXiv 2603.08014"
    summary = "SVD of the mean product: the top R components to the adapter, the next ones to the base"
    mixed_ranks = False
    properties = Properties(gauge_invariant="always")
    missing = "zeros"
    covariance = "total"
    keeps_basis = False
    variants = ({"energy": 1.0},)

    def holds(self) -> Properties:
        return self.properties._replace(exact="always" if self.energy == 1 else "never")

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        pairs: dict[str, LoraPair] = {}
        patch: dict[str, Product] = {}
        for module, before in state.adapter.items():
            product = moments.mean_product(module)
            svd = product.svd()
            pairs[module] = balanced_pair(svd, before, module, state.seed)
            q = min(svd.energy_rank(self.energy), svd.rank(product.dtype))
            if q > before.rank:
                patch[module] = svd.cut(before.rank, q, product.dtype)
        return replace(state, adapter=Adapter(pairs)), patch
