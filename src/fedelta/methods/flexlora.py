"""FlexLoRA (Bai et al., 2402.11505, NeurIPS 2024): the mean product, refactored by SVD for every rank.

    Σ p_i s_i B_i A_i = U Σ Vᵀ,      B = U√Σ,  A = √ΣVᵀ cut to R;   a client downloads its first r_i

The factors are balanced; dropping √Σ or putting all of Σ on one side is a known mistake. Singular values are sorted, so
the first r_i indices are the best approximation of rank r_i. The product of a low-rank client lacks the indices that it
can't hold, so the tail decays from round to round even if no client trains. This is the published rank collapse.

The paper does not define a product of rank below R. It leaves directions with both factors zero, which could never
train again. Here they get a drawn row of A and B = 0, as at the start.
"""

from dataclasses import replace

from fedelta.lora.adapter import Adapter
from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.balanced_pair import balanced_pair
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState


@register
class FlexLoRA(Method):
    name = "flexlora"
    paper = "FlexLoRA, arXiv 2402.11505"
    summary = "SVD of the mean product, balanced, cut to each client's rank"
    properties = Properties(no_op_invariant="equal ranks", gauge_invariant="always")
    missing = "zeros"
    covariance = "total"
    keeps_basis = False
    aliases = (("hlora", "HLoRA, arXiv 2503.00813"),)

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        pairs = {
            module: balanced_pair(moments.mean_product(module).svd(), before, module, state.seed)
            for module, before in state.adapter.items()
        }
        return replace(state, adapter=Adapter(pairs)), {}
