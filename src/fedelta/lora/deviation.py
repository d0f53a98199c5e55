"""Distance between the product of the mean factors and the mean of the products, per layer, without a dense matrix."""

from typing import NamedTuple

import torch

from fedelta.lora.gram import norms
from fedelta.lora.lowrank import LowRank, add
from fedelta.lora.rank_moments import RankMoments


class Deviation(NamedTuple):
    """Deviation of one module.

    Args:
        relative: ‖ΔW − B̄ Ā‖_F / ‖ΔW‖_F; 0 where nothing was trained.
        scaled: ‖ΔW − B̄ Ā‖_F / √(m·n), the root-mean-square error of an element of the weight.
    """

    relative: float
    scaled: float


def deviation(moments: RankMoments) -> dict[str, Deviation]:
    """Return what averaging A and B separately loses in each module (FedEx-LoRA, 2410.09432).

    B̄ and Ā are the means over the contributors of each rank index. ΔW is the mean of products in which these means
    stand in for a rank index that a client does not hold (docs/methods.md 3). The deviation is the loss of separate
    averages in this round, independent of how the method corrects it. The difference is Σ_j cov_j, so nothing cancels.

    Args:
        moments: moments of the round, kept with a covariance.

    Returns:
        Module → deviation.
    """
    result = {}
    for module, mean in moments.means().items():
        residual = moments.covariance(module)
        off, size = residual.norm(), add([LowRank(mean.B, mean.A), residual]).norm()
        m, n = residual.shape
        result[module] = Deviation(off / size if size > 0 else 0.0, off / (m * n) ** 0.5)
    return result


def deviation_from_zero_padding(moments: RankMoments, module: str) -> float:
    """Return ‖ΔW − B̄ Ā‖_F / ‖ΔW‖_F with ΔW = Σ p_i s_i B_i A_i and zeros for rank indices that a client lacks.

    It compares the plain average of the factors of adapter folders, Σ_j c_j² b̄_j ā_j, with their exact mean,
    Σ_j c_j b̄_j ā_j + cov_j.
    """
    c = moments.share(module)
    terms = moments.mean_terms(module)
    low_rank = [term for term in terms if isinstance(term, LowRank)]
    if len(low_rank) < len(terms):
        plain = moments.mean(module, "zeros")
        size, off = add(terms).norm(), add([*terms, LowRank(-plain.B, plain.A)]).norm()
    else:
        missed = 1 - c[c > 0]
        one = torch.ones(sum(term.width for term in low_rank), dtype=torch.float64)
        factors = [(term.U, term.V) for term in low_rank]
        size, off = norms(factors, one, torch.cat([missed, one[len(missed) :]]))
    return off / size if size > 0 else 0.0
