"""How far the mean of factors is from the mean of products, layer by layer, without a dense matrix."""

from collections.abc import Sequence

import torch

from fedelta.adapter import Adapter
from fedelta.contribution import Contribution
from fedelta.lowrank import LowRank


def deviation(contributions: Sequence[Contribution], factors: Adapter, absent: Adapter | None) -> dict[str, float]:
    """‖Σ p_i s_i B_i A_i − B̄ Ā‖_F / ‖Σ p_i s_i B_i A_i‖_F of each module (FedEx-LoRA, 2410.09432).

    At mixed ranks B_i and A_i stand for the client's factors as the method pads them, so the figure is what
    averaging the two factors apart loses, and not what the padding does.

    Args:
        contributions: the round's clients.
        factors: B̄ and Ā, scale 1, as the method returned them.
        absent: what stands in for rank indices that a client does not hold (`Method.absent`); None is zeros.

    Returns:
        Module → relative deviation; 0 where nothing was trained.
    """
    total = sum(c.weight for c in contributions)
    result = {}
    for module, pair in factors.items():
        held = torch.zeros(pair.rank, dtype=torch.float64)
        for c in contributions:
            held[: c.adapter[module].rank] += c.weight / total
        # An index that nobody held was kept as it was, whatever the padding.
        rest = torch.where(held > 0, 0.0 if absent is None else 1 - held, 1.0)
        filler = pair if absent is None else absent[module]
        padding = LowRank(filler.B.double() * rest, filler.A.double())
        trained = [c.adapter[module].product().to(torch.float64).scaled(c.weight / total) for c in contributions]
        exact = LowRank.sum([*trained, padding])
        size = exact.norm()
        off = LowRank.sum([exact, LowRank(-pair.B.double(), pair.A.double())]).norm()
        result[module] = off / size if size > 0 else 0.0
    return result
