"""FLoRIST (Ramesh & Dass, 2506.09199): truncate the stacked product by energy, merge it into the base, restart.

    Σ p_i s_i B_i A_i = U Σ Vᵀ,   q = smallest with Σ_{k≤q} σ_k² ≥ τ Σ σ_k²,   W0 ← W0 + U_q Σ_q V_qᵀ

Each layer is truncated by itself, by the SVD of the stacks and of a small core, never of the m×n matrix. All clients
receive the same pair, merge it and start the next round from a fresh adapter of their own rank. As in `flora`, all
clients share one draw of the fresh A. The factors are balanced (U√Σ, √ΣVᵀ); the paper has UΣ and Vᵀ, with the same
product.
"""

from typing import Annotated

from pydantic import Field

from fedelta.lora.lowrank import Product
from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import Holds, Method, Properties
from fedelta.methods.state import MethodState
from fedelta.protocol.factor_plan import FactorPlan


@register
class FLoRIST(Method):
    """FLoRIST.

    Args:
        energy: τ, the share of Σσ² that is kept, in (0, 1]; 1 is FLoRA with a recompressed stack.
    """

    energy: Annotated[float, Field(gt=0, le=1)] = 0.9

    name = "florist"
    paper = "FLoRIST, arXiv 2506.09199"
    summary = "the stack of all clients, truncated to a share of its energy, into the base; restart"
    properties = Properties(gauge_invariant="always", identity="never")
    missing = "zeros"
    covariance = "total"
    keeps_basis = False
    variants = ({"energy": 1.0},)

    def holds(self) -> Properties:
        scope: Holds = "always" if self.energy == 1 else "never"
        return self.properties._replace(exact=scope, identity=scope)

    def factors(self, round: int) -> FactorPlan:  # noqa: ARG002
        return FactorPlan(down=frozenset())

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        patch: dict[str, Product] = {}
        for module in state.adapter:
            product = moments.mean_product(module)
            svd = product.svd()
            q = min(svd.energy_rank(self.energy), svd.rank(product.dtype))
            if q:
                patch[module] = svd.cut(0, q, product.dtype)
        return self.restart(state), patch
