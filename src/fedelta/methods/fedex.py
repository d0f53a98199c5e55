"""FedEx-LoRA (Singhal et al., 2410.09432, ACL 2025): the mean of factors, and the residual into the base.

    B̄ = Σ p_i s_i B_i,   Ā = Σ p_i A_i,   ΔW_res = Σ p_i s_i B_i A_i − B̄ Ā,   W0 ← W0 + ΔW_res

so that the new global weight is exactly the mean of the clients' weights. The residual is a covariance,
Σ p_i (s_i B_i − B̄)(A_i − Ā), which in fp32 is some hundred times as accurate as the difference of products;
and since Σ p_i (s_i B_i − B̄) = 0, any client k can stand in for Ā:

    ΔW_res = [p_i (s_i B_i − B̄)]_{i≠k} · [A_i − A_k]_{i≠k}

closed-form factors of width (K−1)r, no SVD and nothing dense (docs/methods.md 2).

Mixed ranks (docs/methods.md 3): the factors are replication's contributor means, and what goes into
the base is Σ_j cov_j with cov_j = Σ_{S_j} p_i (b_ij − b̄_j)(a_ij − ā_j). Taking for k a client of the largest
rank, which contributes to every index that anybody holds, gives factors of width Σ r_i − max r_i. So the new
weight is the mean of products after replication; it equals the plain mean of products at equal ranks. (The
unpadded mean Σ p_i s_i B_i A_i with truncated broadcasts diverges even when nobody trains.)
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from fedelta.adapter import Adapter, LoraPair
from fedelta.lowrank import LowRank
from fedelta.methods import register
from fedelta.methods.method import Contribution, Method, MethodState
from fedelta.methods.rank_sums import RankSums


def residual(clients: list[tuple[float, LoraPair]], mean: LoraPair) -> LowRank:
    """Σ_j Σ_{S_j} p_i (s_i b_ij − b̄_j)(a_ij − ā_j) as factors of width Σ r_i − max r_i.

    Args:
        clients: (p_i, pair) with Σ p_i = 1.
        mean: contributor means at scale 1, before rounding matters: (m, R) and (R, n).

    Returns:
        Factors in the dtype of the mean, computed in float64.
    """
    # Any client of the largest rank will do; the heaviest one keeps the p_i of the others, and rounding, small.
    reference = max(range(len(clients)), key=lambda i: (clients[i][1].rank, clients[i][0]))
    A_k = clients[reference][1].A.double()
    m, n = mean.shape
    U, V = [torch.zeros(m, 0, dtype=torch.float64)], [torch.zeros(0, n, dtype=torch.float64)]
    for i, (p, pair) in enumerate(clients):
        if i != reference:
            U.append(p * (pair.scale * pair.B.double() - mean.B[:, : pair.rank].double()))
            V.append(pair.A.double() - A_k[: pair.rank])
    return LowRank(torch.cat(U, dim=1), torch.cat(V, dim=0)).to(mean.B.dtype)


@register
class FedEx(Method):
    name = "fedex"
    paper = "FedEx-LoRA, arXiv 2410.09432; mixed ranks: docs/methods.md 3"
    summary = "mean of factors, and the exact residual folded into the base weight"
    mixed_ranks = True
    exact = "equal ranks"
    no_op_invariant = "always"
    gauge_invariant = "equal ranks"
    reduces_to_fedit = "never"
    linear = False

    def aggregate(
        self, state: MethodState, contributions: Iterable[Contribution]
    ) -> tuple[MethodState, dict[str, LowRank]]:
        contributions = list(contributions)
        sums = RankSums.of(state.adapter, contributions)
        means, patch, pairs = sums.contributor_means(torch.float64), {}, {}
        for module, mean in means.items():
            dtype = state.adapter[module].B.dtype
            pairs[module] = LoraPair(mean.A.to(dtype), mean.B.to(dtype))
            clients = [(c.weight / sums.weight, c.adapter[module]) for c in contributions]
            product = residual(clients, mean).to(dtype)
            if bool(product.U.any()) and bool(product.V.any()):
                patch[module] = product
        return replace(state, adapter=Adapter(pairs)), patch
