"""FedEx-LoRA (Singhal et al., 2410.09432, ACL 2025): the mean of the factors, with the residual added to the base.

    B̄ = Σ p_i s_i B_i,   Ā = Σ p_i A_i,   ΔW_res = Σ p_i s_i B_i A_i − B̄ Ā,   W0 ← W0 + ΔW_res

The new global weight is exactly the mean of the clients' weights. The residual is a covariance,
Σ p_i (s_i B_i − B̄)(A_i − Ā), and is computed as one (`rank_moments`): factors of width (K−1)r in closed form, without
an SVD and without a dense matrix (docs/methods.md 2).

Mixed ranks (docs/methods.md 3): the factors are the contributors' means b̄_j, ā_j, as in replication. With
cov_j = Σ_{S_j} p_i (s_i b_ij − b̄_j)(a_ij − ā_j), the patch of the base depends on the target:

    replicated        Σ_j cov_j                                        mean of products after replication; the default
    rank-normalized   Σ_j cov_j / c_j                                  raFLoRA's mean, each index by its contributors
    start-relative    Σ_j cov_j + (1 − c_j)(b⁰_j a⁰_j − b̄_j ā_j)       old weight + Σ p_i × change of client i

All three are the same at equal ranks. With the third, a client adds the rank indices that it can't hold to its base
for the round, so that its change is a change of the whole model; use it with `refresh`. (The unpadded mean
Σ p_i s_i B_i A_i with truncated broadcasts is not available: it diverges even if no client trains.)

The paper also truncates the residual to a rank r′ (Eckart–Young). The option `residual` does this, and the part that is
cut off is kept for the next round unless `feedback` is false.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fedelta.lora.adapter import LoraPair
from fedelta.lora.lowrank import LowRank, Product, add
from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import Covariance, RankMoments
from fedelta.methods import register
from fedelta.methods.method import ClientStart, ClientView, Holds, Method, Properties
from fedelta.methods.residual_cut import cut_residuals, parse_cut
from fedelta.methods.state import MethodState


@register
class FedEx(Method):
    """FedEx-LoRA.

    Args:
        residual: part of the residual that is sent: `exact`, `rank=q`, `energy=τ` or `bytes=N`.
        feedback: keep the part that is cut off for the next round.
        target: weight that the server aims at with mixed ranks (docs/methods.md 3).
    """

    residual: str = "exact"
    feedback: bool = True
    target: Literal["replicated", "rank-normalized", "start-relative"] = "replicated"

    name = "fedex"
    paper = "FedEx-LoRA, arXiv 2410.09432; mixed ranks: docs/methods.md 3"
    summary = "mean of factors, with the exact residual added to the base weight"
    properties = Properties(exact="equal ranks", gauge_invariant="equal ranks")
    variants = (
        {"target": "rank-normalized"},
        {"target": "start-relative"},
        {"residual": "rank=2"},
        {"residual": "rank=2", "feedback": False},
        {"residual": "energy=0.9"},
        {"residual": "bytes=500"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_cut(self.residual)

    def holds(self) -> Properties:
        scope: Holds = "always" if self.target == "start-relative" else "equal ranks"
        if self.residual != "exact":
            scope = "never"
        return self.properties._replace(exact=scope, gauge_invariant=scope)

    @property
    def covariance(self) -> Covariance:  # type: ignore[override]
        return "by rank" if self.target == "rank-normalized" else "total"

    @property
    def by_module(self) -> bool:
        return super().by_module and parse_cut(self.residual).kind != "bytes"

    def personalize(self, state: MethodState, client: ClientView) -> ClientStart:
        adapter = state.adapter.truncate(client.rank)
        if self.target != "start-relative" or client.rank >= state.adapter.rank:
            return ClientStart(adapter)
        rest = torch.arange(client.rank, state.adapter.rank)
        tail = {module: pair.select(rest).product() for module, pair in state.adapter.items()}
        # In round 0 and after a refresh, B is zero.
        return ClientStart(adapter, {module: product for module, product in tail.items() if not product.is_zero()})

    def exact_mean(self, state: MethodState, moments: RankMoments, module: str) -> Product:
        mean = moments.mean(module)
        return add([LowRank(mean.B, mean.A), self._residual(state, moments, module, mean)])

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        means = moments.means()
        residuals = {module: self._residual(state, moments, module, mean) for module, mean in means.items()}
        patch, memory = cut_residuals(residuals, parse_cut(self.residual), state.memory, self.feedback)
        return replace(state, adapter=means, memory=memory), patch

    def _residual(self, state: MethodState, moments: RankMoments, module: str, mean: LoraPair) -> Product:
        if self.target == "rank-normalized":
            return moments.normalized_covariance(module)
        if self.target == "start-relative":
            unchanged = _unchanged(moments.share(module), state.adapter[module], mean)
            return add([moments.covariance(module), unchanged])
        return moments.covariance(module)


def _unchanged(c: Tensor, old: LoraPair, new: LoraPair) -> LowRank:
    """Return Σ_j (1 − c_j)(b⁰_j a⁰_j − b̄_j ā_j) over the indices that some, but not all, clients trained."""
    partly = (c > 0) & (c < 1)
    # b⁰a⁰ − b̄ā = (b⁰ − b̄) a⁰ + b̄ (a⁰ − ā) avoids a difference of large products.
    rest = (1 - c).to(old.B.dtype)[partly]
    U = torch.cat([(old.B - new.B)[:, partly] * rest, new.B[:, partly] * rest], dim=1)
    return LowRank(U, torch.cat([old.A[partly], (old.A - new.A)[partly]]))
