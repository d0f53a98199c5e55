"""RoLoRA (Chen et al., 2502.01755): rounds alternate between training B and training A.

    even rounds:  A fixed,  b_j ← b_j + Σ_{S_j} p_i (s_i b_ij − b_j)
    odd rounds:   B fixed,  a_j ← a_j + Σ_{S_j} p_i (a_ij − a_j)

The factor that nobody trains is the same at all clients, so the mean of products is the product of the means, as with
a frozen A, and both factors come to learn. Only the trained factor is sent back.

The paper does not fix in which order; B first is the default, because as long as B = 0 the gradient of A is zero and
the first round would be lost. At mixed ranks, which the paper does not have, a client that does not hold
index j counts as unchanged there, which keeps the step exact.
"""

from dataclasses import replace
from typing import Literal

from fedelta.errors import FedeltaError
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState, Patch
from fedelta.protocol.messages import FactorPlan


@register
class RoLoRA(Method):
    """Options: the factor that the first round trains."""

    first: Literal["A", "B"] = "B"

    name = "rolora"
    paper = "RoLoRA, arXiv 2502.01755"
    summary = "rounds train B and A in turn; exact, half the upload"
    properties = Properties(exact="always", linear=True)
    variants = ({"first": "A"},)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refresh % 2:
            raise FedeltaError(
                f"method rolora: refresh {self.refresh} would restart when it is the other factor's turn, which has no "
                "gradient while B is zero; expected an even number of rounds"
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
