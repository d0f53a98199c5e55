"""How far the mean of factors is from the mean of products, layer by layer, without a dense matrix."""

from fedelta.adapter import Adapter
from fedelta.contribution import Contribution
from fedelta.lowrank import LowRank, add
from fedelta.rank_moments import RankMoments


class DeviationMeter:
    """‖ΔW − B̄ Ā‖_F / ‖ΔW‖_F of each module, for a round's clients folded in one at a time (FedEx-LoRA, 2410.09432).

    B̄ and Ā are the means over the contributors of each rank index, and ΔW the mean of products in which a client counts
    as those means where it holds nothing (docs/methods.md 3): what averaging the two factors apart would lose
    in this round, whatever the method does about it. The difference is Σ_j cov_j, so nothing cancels.

    Args:
        previous: the global adapter, scale 1.
    """

    def __init__(self, previous: Adapter) -> None:
        self._moments = RankMoments(previous, covariance="total")

    def add(self, contribution: Contribution) -> None:
        self._moments.add(contribution)

    def read(self) -> dict[str, float]:
        """Module → relative deviation; 0 where nothing was trained. Uses up the sums."""
        result = {}
        for module, mean in self._moments.means().items():
            residual = self._moments.covariance(module)
            off = residual.norm()
            size = add([LowRank(mean.B, mean.A), residual]).norm()
            result[module] = off / size if size > 0 else 0.0
        return result
