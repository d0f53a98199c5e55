"""Zero padding (FedAvg on padded factors; the baseline of Byun & Lee, 2406.17477).

Every client is padded with zeros to rank R, then averaged:

    b_j = Σ_{S_j} p_i s_i b_ij        a_j = Σ_{S_j} p_i a_ij

A rank index held by mass c_j is diluted by c_j in b and again in a, so its product shrinks by c_j² every
round: the published rank collapse, kept as it is. An index that nobody in the round holds keeps its value
(zeros in both factors could never train again).
"""

from collections.abc import Iterable
from dataclasses import replace

from fedelta.lowrank import LowRank
from fedelta.methods import register
from fedelta.methods.method import Contribution, Method, MethodState
from fedelta.methods.rank_sums import RankSums


@register
class ZeroPadding(Method):
    name = "zero-padding"
    paper = "baseline of Byun & Lee, arXiv 2406.17477"
    summary = "pad with zeros to the largest rank, then average; dilutes what few clients hold"
    mixed_ranks = True
    exact = "never"
    no_op_invariant = "equal ranks"
    gauge_invariant = "never"
    reduces_to_fedit = "equal ranks"
    linear = True

    def absent(self, before: MethodState, after: MethodState) -> None:  # noqa: ARG002
        return None

    def aggregate(
        self, state: MethodState, contributions: Iterable[Contribution]
    ) -> tuple[MethodState, dict[str, LowRank]]:
        means = RankSums.of(state.adapter, contributions).zero_padded_means()
        return replace(state, adapter=means), {}
