"""FedSVD (Lee et al., 2505.12805): clients train B; the server refactors B·A, so that A follows the training.

    b̂_j = b_j + Σ_{S_j} p_i (s_i b_ij − b_j),      B̂ A = U Σ Vᵀ,      A ← Vᵀ,  B ← U Σ

The product does not change, and A gets orthonormal rows with the same span. With B̂ (m×r) and A = R Q (Q with
orthonormal rows), the SVD of B̂R gives all r directions, including those without energy, so no direction is lost while
B̂ = 0. A shared A makes the mean exact. The paper has equal ranks. With mixed ranks, a client that does not hold index
j counts as unchanged there, which keeps the mean exact.
"""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field

from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState
from fedelta.protocol.factor_plan import FactorPlan


def refactor(pair: LoraPair) -> LoraPair:
    """Return UΣ and Vᵀ of B·A. The rows of Vᵀ are orthonormal even if singular values are zero."""
    m, r = pair.B.shape
    Q, R = torch.linalg.qr(pair.A.double().T)  # Aᵀ = Q·R
    core = pair.B.double() @ R.T  # (m, r)
    # Zero rows for a layer with fewer than r outputs, so that the SVD has all r directions.
    left, sigma, right = torch.linalg.svd(torch.nn.functional.pad(core, (0, 0, 0, max(0, r - m))), full_matrices=False)
    A, B = right @ Q.T, (left * sigma)[:m]
    missing = r - len(A)  # more rank indices than inputs: the remaining rows and columns are zero
    A, B = torch.nn.functional.pad(A, (0, 0, 0, missing)), torch.nn.functional.pad(B, (0, missing))
    return LoraPair(A.to(pair.A.dtype), B.to(pair.B.dtype))


@register
class FedSVD(Method):
    """FedSVD.

    Args:
        every: number of rounds from one refactoring to the next.
    """

    every: Annotated[int, Field(ge=1)] = 1

    name = "fedsvd"
    paper = "FedSVD, arXiv 2505.12805"
    summary = "mean of B, then SVD of B·A, so that A gets the learned directions; exact"
    properties = Properties(exact="always", identity="equal ranks")
    missing = "unchanged"
    keeps_basis = False

    def factors(self, round: int) -> FactorPlan:  # noqa: ARG002
        return FactorPlan(train=frozenset("B"), up=frozenset("B"))

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        means = moments.means("unchanged")
        pairs = {module: LoraPair(pair.A, means[module].B) for module, pair in state.adapter.items()}
        if (state.round + 1) % self.every == 0:
            pairs = {module: refactor(pair) for module, pair in pairs.items()}
        return replace(state, adapter=Adapter(pairs)), {}
