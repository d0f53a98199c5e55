"""FedIT (Zhang et al., 2305.05644): federated averaging of the two factors.

    B̄ = Σ p_i s_i B_i        Ā = Σ p_i A_i

Inexact: Σ p_i s_i B_i A_i ≠ B̄ Ā as soon as clients differ in both factors. Equal ranks only.
"""

from collections.abc import Iterable
from dataclasses import replace

from fedelta.lowrank import LowRank
from fedelta.methods import register
from fedelta.methods.method import Contribution, Method, MethodState
from fedelta.methods.rank_sums import RankSums


@register
class FedIT(Method):
    name = "fedit"
    paper = "FedIT, arXiv 2305.05644"
    summary = "mean of A and mean of B"
    mixed_ranks = False
    exact = "never"
    no_op_invariant = "always"
    gauge_invariant = "never"
    reduces_to_fedit = "always"
    linear = True

    def aggregate(
        self, state: MethodState, contributions: Iterable[Contribution]
    ) -> tuple[MethodState, dict[str, LowRank]]:
        means = RankSums.of(state.adapter, contributions).contributor_means()
        return replace(state, adapter=means), {}
