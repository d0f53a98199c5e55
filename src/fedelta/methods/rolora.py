"""RoLoRA (Chen et al., 2502.01755): rounds alternate between training B and training A.

    even rounds:  A fixed,  b_j ← b_j + Σ_{S_j} p_i (s_i b_ij − b_j)
    odd rounds:   B fixed,  a_j ← a_j + Σ_{S_j} p_i (a_ij − a_j)

The fixed factor is the same at all clients, so the mean of the products is the product of the means, as with a frozen
A, but both factors learn. Only the trained factor is sent back.

The paper does not define the order. The default is B first: the gradient of A is zero while B = 0, so the first round
would be lost. With mixed ranks, which the paper does not cover, a client that does not hold index j counts as unchanged
there, which keeps the step exact.
"""

from dataclasses import replace
from typing import Literal

from fedelta.errors import FedeltaError, quantity
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState
from fedelta.protocol.factor_plan import FactorPlan


@register
class RoLoRA(Method):
    """RoLoRA.

    Args:
        first: factor that round 0 trains, `A` or `B`.
    """

    first: Literal["A", "B"] = "B"

    name = "rolora"
    paper = "RoLoRA, arXiv 2502.01755"
    summary = "rounds train B and A in turn; exact, half the upload"
    properties = Properties(exact="always", linear=True)
    missing = "unchanged"
    variants = ({"first": "A"},)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refresh % 2:
            raise FedeltaError(
                f"method rolora: refresh: {quantity(self.refresh, 'round')} would restart before a round that trains "
                "the other factor, whose gradient is zero while B is zero; expected an even number"
            )

    def factors(self, round: int) -> FactorPlan:
        factor = frozenset(("BA" if self.first == "B" else "AB")[round % 2])
        return FactorPlan(train=factor, up=factor)

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        means = moments.means("unchanged")
        (factor,) = self.factors(state.round).train
        pairs = {
            module: LoraPair(pair.A, means[module].B) if factor == "B" else LoraPair(means[module].A, pair.B)
            for module, pair in state.adapter.items()
        }
        return replace(state, adapter=Adapter(pairs)), {}
