"""FedIT (Zhang et al., 2305.05644): federated averaging of the two factors, each by itself.

    B̄ = Σ p_i s_i B_i        Ā = Σ p_i A_i

Inexact: Σ p_i s_i B_i A_i ≠ B̄ Ā if clients differ in both factors. Equal ranks only.
"""

from dataclasses import replace

from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState


@register
class FedIT(Method):
    name = "fedit"
    paper = "FedIT, arXiv 2305.05644"
    summary = "mean of A and mean of B"
    mixed_ranks = False
    properties = Properties(reduces_to_fedit="always", linear=True)

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        return replace(state, adapter=moments.means()), {}
