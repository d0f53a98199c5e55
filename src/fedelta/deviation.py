"""How far the mean of factors is from the mean of products, layer by layer, without a dense matrix."""

import torch
from torch import Tensor

from fedelta.lowrank import Dense, LowRank, Product, add
from fedelta.rank_moments import RankMoments


def deviation(moments: RankMoments) -> dict[str, float]:
    """‖ΔW − B̄ Ā‖_F / ‖ΔW‖_F of each module (FedEx-LoRA, 2410.09432).

    B̄ and Ā are the means over the contributors of each rank index, and ΔW the mean of products in which a client counts
    as those means where it holds nothing (docs/methods.md 3): what averaging the two factors apart would lose
    in this round, whatever the method does about it. The difference is Σ_j cov_j, so nothing cancels.

    Args:
        moments: with a covariance.

    Returns:
        Module → relative deviation; 0 where nothing was trained.
    """
    result = {}
    for module, mean in moments.means().items():
        residual = moments.covariance(module)
        size, off = _norms(LowRank(mean.B, mean.A), torch.zeros(mean.rank), residual)
        result[module] = off / size if size > 0 else 0.0
    return result


def deviation_from_zero_padding(moments: RankMoments, module: str) -> float:
    """‖ΔW − B̄ Ā‖_F / ‖ΔW‖_F with ΔW = Σ p_i s_i B_i A_i and zeros averaged in where a client holds nothing.

    What a person gets who averages the factors of adapter folders, against their exact mean
    Σ_j c_j b̄_j ā_j + cov_j; the plain average is Σ_j c_j² b̄_j ā_j.
    """
    c, mean = moments.share(module), moments.means()[module]
    centre = LowRank(mean.B * c.to(mean.B.dtype), mean.A)
    size, off = _norms(centre, 1 - c, moments.covariance(module))
    return off / size if size > 0 else 0.0


def _norms(centre: LowRank, left: Tensor, rest: Product) -> tuple[float, float]:
    """‖centre + rest‖ and ‖centre·diag(left) + rest‖, where diag(left) acts on the rank indices of the centre."""
    if isinstance(rest, Dense):
        scaled = LowRank(centre.U * left.to(centre.dtype), centre.V)
        return add([centre, rest]).norm(), add([scaled, rest]).norm()
    whole = LowRank.sum([centre, rest])
    one = torch.ones(whole.width)
    size, off = whole.norms(one, torch.cat([left.to(one.dtype), one[centre.width :]]))
    return size, off
