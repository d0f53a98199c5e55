"""HetLoRA (Cho et al., 2401.06432): zero padding, weights by norm, and clients that prune their tail.

Server, with S_i = ‖s_i B_i A_i‖_F over all modules of the adapter:

    p_i = S_i / Σ S,      b_j = Σ_{S_j} p_i s_i b_ij,      a_j = Σ_{S_j} p_i a_ij

Client of rank r, whose tail starts at t = ⌊γr⌋:

    loss + λ Σ_modules ‖B[:, t:]‖_F ‖A[t:]‖_F

If that sum is smaller after training than in the adapter that the client received, the client prunes its adapter to
rank max(t, min_rank), and the server sends it that rank from then on.

The text of the paper that was available leaves two points open. S_i may belong to a layer or to the whole adapter; here
it belongs to the whole adapter, with one weight per client. The values of γ and λ, 0.99 and 0.01, follow public
reimplementations.
"""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedelta.lora.adapter import Adapter
from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState
from fedelta.protocol.factor_plan import FactorPlan


@register
class HetLoRA(Method):
    """HetLoRA.

    Args:
        gamma: γ, the share of the rank indices before the tail, in (0, 1]; 1 never prunes.
        penalty_weight: λ, the weight of the penalty on the tail.
        min_rank: smallest rank to which a client prunes its adapter.
    """

    norm_weighting: bool = True
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.99
    penalty_weight: Annotated[float, Field(ge=0)] = 0.01
    min_rank: Annotated[int, Field(ge=1)] = 1

    name = "hetlora"
    paper = "HetLoRA, arXiv 2401.06432"
    summary = "zero padding, clients weighted by the norm of their update, small tails pruned"
    properties = Properties(no_op_invariant="equal ranks")
    missing = "zeros"

    def factors(self, round: int) -> FactorPlan:  # noqa: ARG002
        return FactorPlan(prune=self.gamma < 1)

    def _tail(self, adapter: Adapter) -> Tensor:
        """Return Σ ‖B[:, t:]‖_F ‖A[t:]‖_F over the modules, a scalar."""
        norms = []
        for pair in adapter.values():
            t = int(self.gamma * pair.rank)
            norms.append(torch.linalg.norm(pair.B[:, t:]) * torch.linalg.norm(pair.A[t:]))
        return torch.stack(norms).sum()

    def penalty(self, start: Adapter, trained: Adapter) -> Tensor | None:  # noqa: ARG002
        if self.gamma == 1 or self.penalty_weight == 0:
            return None
        return self.penalty_weight * self._tail(trained)

    def finish(self, round: int, start: Adapter, trained: Adapter) -> Adapter:  # noqa: ARG002
        rank = max(int(self.gamma * trained.rank), self.min_rank)
        if rank < trained.rank and bool(self._tail(trained) < self._tail(start)):
            return trained.truncate(rank)
        return trained

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        return replace(state, adapter=moments.means("zeros")), {}
