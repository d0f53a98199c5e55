"""FLoRA (Wang et al., 2409.05976, NeurIPS 2024): stack, merge into the base, restart.

    ΔW = [B_1 … B_K]·[p_1 s_1 A_1; …; p_K s_K A_K] = Σ p_i s_i B_i A_i,      W0 ← W0 + ΔW

and every client starts the next round from a fresh A and B = 0. Exact at any ranks; the stack, of width Σ r_i, is what
the base patch sends. The fresh adapter is drawn from a seed, so nothing of it is sent.

The paper's clients each draw an A of their own; here it is one draw for all, which costs nothing and keeps a
round reproducible. `restart_from: same` uses the first round's A in all rounds.
"""

from dataclasses import replace
from typing import Literal

from fedelta.lora.adapter import LoraPair
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState, Patch
from fedelta.protocol.messages import FactorPlan


@register
class FLoRA(Method):
    """Options: whether a round starts from a fresh draw of A or from the same one."""

    restart_from: Literal["fresh", "same"] = "fresh"

    name = "flora"
    paper = "FLoRA, arXiv 2409.05976"
    summary = "stack all clients into the base, restart the adapter; exact at any ranks"
    properties = Properties(exact="always", gauge_invariant="always")
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
        # The state's own B is zero: what clients trained is in the patch.
        zero = state.adapter.map(lambda pair: LoraPair(pair.A, pair.B.new_zeros(pair.B.shape)))
        return replace(state, adapter=zero), patch
