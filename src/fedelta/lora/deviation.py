"""How far the mean of factors is from the mean of products, layer by layer, without a dense matrix."""

from typing import NamedTuple

import torch

from fedelta.lora.gram import norms
from fedelta.lora.lowrank import LowRank, add
from fedelta.lora.rank_moments import RankMoments


class Deviation(NamedTuple):
    """Of one module.

    Args:
        relative: ‖ΔW − B̄ Ā‖_F / ‖ΔW‖_F; 0 where nothing was trained.
        scaled: ‖ΔW − B̄ Ā‖_F / √(m·n), what an element of the weight is off by.
    """

    relative: float
    scaled: float


def deviation(moments: RankMoments) -> dict[str, Deviation]:
    """What averaging A and B apart loses in each module (FedEx-LoRA, 2410.09432).

    B̄ and Ā are the means over the contributors of each rank index, and ΔW the mean of products in which a client counts
    as those means where it holds nothing (docs/methods.md 3): what averaging the two factors apart would lose
    in this round, whatever the method does about it. The difference is Σ_j cov_j, so nothing cancels.

    Args:
        moments: with a covariance.

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
    """‖ΔW − B̄ Ā‖_F / ‖ΔW‖_F with ΔW = Σ p_i s_i B_i A_i and zeros averaged in where a client holds nothing.

    What a person gets who averages the factors of adapter folders, against their exact mean
    Σ_j c_j b̄_j ā_j + cov_j; the plain average is Σ_j c_j² b̄_j ā_j.
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
