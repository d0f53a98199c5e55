"""What a method's step loses of the mean product that it approximates, per layer, without a dense matrix."""

from fedelta.lora.lowrank import LowRank, Product, add
from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods.method import Method
from fedelta.methods.state import MethodState


def lost_in_step(
    method: Method, before: MethodState, moments: RankMoments, after: MethodState, patch: Patch
) -> dict[str, float]:
    """Return ‖ΔW − (B·A + patch)‖_F / ‖ΔW‖_F for each module, where ΔW is the method's `exact_mean`.

    B, A and the patch are the result of the step. `deviation` measures the error that separate averages would have,
    which is the same for a method that corrects it and one that does not; this is the error that is left.

    Args:
        method: the method.
        before: state as broadcast in this round.
        moments: moments of the round, kept with a covariance.
        after, patch: result of `Method.conclude`.

    Returns:
        Module → relative error, 0 where nothing was trained. Empty if the method does not approximate a mean, or moves
        on from it by an optimizer.
    """
    if method.server_optimizer != "none":
        return {}
    result = {}
    for module, pair in after.adapter.items():
        mean = method.exact_mean(before, moments, module)
        if mean is None:
            return {}
        reached: list[Product] = [LowRank(-pair.B, pair.A)]
        if module in patch:
            reached.append(patch[module].scaled(-1.0))
        size = mean.norm()
        result[module] = add([mean, *reached]).norm() / size if size > 0 else 0.0
    return result
