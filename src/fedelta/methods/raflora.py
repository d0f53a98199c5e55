"""raFLoRA (2602.13486): each block of rank indices is averaged over the clients that hold it, then SVD to rank R.

    ΔW = Σ_j Σ_{S_j} (p_i / c_j) s_i b_ij a_ij = U Σ Vᵀ,      B = U√Σ,  A = √ΣVᵀ cut to R

The indices between two neighboring ranks have the same contributors, which is the paper's partition. No index is
diluted, so no rank collapses. An index that no client holds in the round keeps its previous product. The paper does not
define this case; dropping the index would lose the tail in every round without a high-rank client.

`exact: true` avoids the loss of the cut: the factors are the contributors' means, and the rest of ΔW, Σ_j cov_j/c_j, is
added to the base (docs/methods.md 3).
"""

from dataclasses import replace

from fedelta.lora.adapter import Adapter
from fedelta.lora.lowrank import LowRank, Product, add
from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.balanced_pair import balanced_pair
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState


@register
class RaFLoRA(Method):
    """raFLoRA.

    Args:
        exact: send the contributors' means and add the rest of ΔW to the base.
    """

    exact: bool = False

    name = "raflora"
    paper = "raFLoRA, arXiv 2602.13486"
    summary = "mean product over the clients that hold each rank index, SVD to the largest rank"
    properties = Properties(gauge_invariant="equal ranks", identity="equal ranks")
    covariance = "by rank"
    keeps_basis = False
    variants = ({"exact": True},)

    def holds(self) -> Properties:
        return self.properties._replace(exact="equal ranks", identity="always") if self.exact else self.properties

    def exact_mean(self, state: MethodState, moments: RankMoments, module: str) -> Product:  # noqa: ARG002
        # Σ_{S_j} (p_i/c_j) s_i b_ij a_ij = b̄_j ā_j + cov_j/c_j, and means hold b⁰_j, a⁰_j where c_j = 0.
        mean = moments.mean(module)
        return add([LowRank(mean.B, mean.A), moments.normalized_covariance(module)])

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        if self.exact:
            rest = {module: moments.normalized_covariance(module) for module in state.adapter}
            patch = {module: product for module, product in rest.items() if not product.is_zero()}
            return replace(state, adapter=moments.means()), patch
        pairs = {
            module: balanced_pair(self.exact_mean(state, moments, module).svd(), before, module, state.seed)
            for module, before in state.adapter.items()
        }
        return replace(state, adapter=Adapter(pairs)), {}
