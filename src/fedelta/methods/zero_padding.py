"""Zero padding (FedAvg on padded factors; the baseline of Byun & Lee, 2406.17477).

Every client is padded with zeros to rank R, then all clients are averaged:

    b_j = Σ_{S_j} p_i s_i b_ij        a_j = Σ_{S_j} p_i a_ij

An index of mass c_j is diluted by c_j in b and again in a, so its product shrinks by c_j² every round. This is the
published rank collapse, reproduced as it is. An index that no client holds in the round keeps its value, because zeros
in both factors could never train again.
"""

from dataclasses import replace

from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState


@register
class ZeroPadding(Method):
    name = "zero-padding"
    paper = "baseline of Byun & Lee, arXiv 2406.17477"
    summary = "pad with zeros to the largest rank, then average; dilutes indices that few clients hold"
    properties = Properties(no_op_invariant="equal ranks", reduces_to_fedit="equal ranks", linear=True)
    missing = "zeros"

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        return replace(state, adapter=moments.means("zeros")), {}
