"""FFA-LoRA (Sun et al., 2403.12313): A is drawn once and frozen; clients train B.

    A_i = A⁰[:r_i]        b_j ← b_j + Σ_{S_j} p_i (s_i b_ij − b_j)

With a shared A, the mean of the products is the product of the mean, Σ p_i s_i B_i A = B̄ A, so the average is exact.
The paper has equal ranks. With mixed ranks, a client that does not hold index j counts as unchanged there, which keeps
the step exact: the new weight is the old one plus Σ p_i × the change of client i.

A is never sent. Each client draws it from the seed (`draw_A`), which halves the traffic in both directions.
"""

from dataclasses import replace

from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState
from fedelta.protocol.factor_plan import FactorPlan

B_ALONE = frozenset("B")


@register
class FFA(Method):
    name = "ffa"
    paper = "FFA-LoRA, arXiv 2403.12313"
    summary = "A frozen at its initial draw, mean of B; exact, half the bytes, fewer directions"
    properties = Properties(exact="always", reduces_to_fedit="equal ranks", linear=True)
    missing = "unchanged"

    def factors(self, round: int) -> FactorPlan:  # noqa: ARG002
        return FactorPlan(down=B_ALONE, train=B_ALONE, up=B_ALONE)

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        means = moments.means("unchanged")
        pairs = {module: LoraPair(state.adapter[module].A, pair.B) for module, pair in means.items()}
        return replace(state, adapter=Adapter(pairs)), {}
