"""FLoRA (Wang et al., 2409.05976, NeurIPS 2024): stack the clients, merge the stack into the base, restart.

    ΔW = [B_1 … B_K]·[p_1 s_1 A_1; …; p_K s_K A_K] = Σ p_i s_i B_i A_i,      W0 ← W0 + ΔW

Every client starts the next round from a fresh A and B = 0. The method is exact at any ranks. The base patch sends the
stack, of width Σ r_i. The fresh adapter is drawn from a seed, so it is not sent.

In the paper, each client draws its own A. Here all clients share one draw, which costs nothing and keeps a round
reproducible. `restart_from: same` uses the A of the first round in all rounds.
"""

from dataclasses import replace
from typing import Literal

from fedelta.lora.adapter import LoraPair
from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState
from fedelta.protocol.factor_plan import FactorPlan


@register
class FLoRA(Method):
    """FLoRA.

    Args:
        restart_from: `fresh` draws a new A for every round; `same` uses the first A in all rounds.
    """

    restart_from: Literal["fresh", "same"] = "fresh"

    name = "flora"
    paper = "FLoRA, arXiv 2409.05976"
    summary = "stack all clients into the base, restart the adapter; exact at any ranks"
    properties = Properties(exact="always", gauge_invariant="always")
    missing = "zeros"
    covariance = "total"
    keeps_basis = False
    variants = ({"restart_from": "same"},)

    def factors(self, round: int) -> FactorPlan:  # noqa: ARG002
        return FactorPlan(down=frozenset())

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        stacks = {module: moments.mean_product(module) for module in state.adapter}
        patch = {module: stack for module, stack in stacks.items() if not stack.is_zero()}
        if self.restart_from == "fresh":
            return self.restart(state), patch
        # B is zero again, because the patch holds what the clients trained.
        zero = state.adapter.map(lambda pair: LoraPair(pair.A, pair.B.new_zeros(pair.B.shape)))
        return replace(state, adapter=zero), patch
