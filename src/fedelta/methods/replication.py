"""Replication padding (Byun & Lee, 2406.17477, NAACL 2025).

The rows of A and columns of B that a low-rank client lacks are filled with the weighted mean of the clients that have
them, then all clients are averaged. This equals the weighted mean over the contributors of each rank index
(docs/methods.md 1), so one rule covers any number of rank levels:

    b̄_j = Σ_{S_j} p_i s_i b_ij / c_j        ā_j = Σ_{S_j} p_i a_ij / c_j

An index that no client holds in the round keeps its previous values. A client downloads the first r_i indices.
"""

from dataclasses import replace

from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState


@register
class Replication(Method):
    name = "replication"
    paper = "Byun & Lee, arXiv 2406.17477"
    summary = "mean over the clients that hold a rank index, without dilution"
    properties = Properties(reduces_to_fedit="equal ranks", linear=True)
    aliases = (("rbla", "RBLA, arXiv 2408.08699"), ("fedilora", "FediLoRA, arXiv 2509.06984"))

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        return replace(state, adapter=moments.means()), {}
