"""FlexLoRA (Bai et al., 2402.11505, NeurIPS 2024): the mean product, factored anew for every rank.

    Σ p_i s_i B_i A_i = U Σ Vᵀ,      B = U√Σ,  A = √ΣVᵀ cut to R;   a client downloads its first r_i

Losing √Σ, or putting it on one side, is a known mistake: factors are balanced. Singular values come sorted, so the
first r_i indices are the best approximation of rank r_i. What a low-rank client can't hold is missing from its
product, so the tail fades round by round even if nobody trains: the published rank collapse.

Open in the paper: a product of rank below R leaves directions with both factors zero, which could never train again;
they get a fresh row of A and B = 0, as at the start.
"""

from dataclasses import replace

from fedelta.lora.adapter import Adapter
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.balanced_pair import balanced_pair
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState, Patch


@register
class FlexLoRA(Method):
    name = "flexlora"
    paper = "FlexLoRA, arXiv 2402.11505"
    summary = "SVD of the mean product, balanced, cut to each client's rank"
    properties = Properties(no_op_invariant="equal ranks", gauge_invariant="always")
    covariance = "total"
    keeps_basis = False
    aliases = (("hlora", "HLoRA, arXiv 2503.00813"),)

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        pairs = {
            module: balanced_pair(moments.mean_product(module).svd(), before, module, state.seed)
            for module, before in state.adapter.items()
        }
        return replace(state, adapter=Adapter(pairs)), {}
