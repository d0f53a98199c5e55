"""Updates that are far larger than the other updates of their round.

An update is compared with what its client was sent: by which factor did the norm of its adapter and of its heads grow?
A client is an outlier if its factor exceeds both `max_growth` and `max_growth` times the median of the other clients.
So one client can't outweigh a round, and clients that all move far, as at a high learning rate, are all used.

The median is known only at the end of a round. Until then only the suspects are kept, the updates that grew by more
than `max_growth`. All others are aggregated and dropped as they come, so memory does not grow with the number of
clients.
"""

from collections.abc import Mapping
from statistics import median_low

from fedelta.lora.contribution import Contribution, Norms

UNIT_LOSS = 1e4
"""Loss that is treated as a growth by 1. The loss is a mean over rows or tokens, so a larger one is unusual."""

Growth = Mapping[str, float]
"""Quantity → factor by which it grew during a client's training."""


def growth(contribution: Contribution) -> Growth:
    """Return the factors by which a client's norms grew, and its losses in units of `UNIT_LOSS`.

    A norm below 1 counts as 1, so that heads that start at zero can grow.
    """
    sizes = zip(Norms._fields, contribution.norms, contribution.start, strict=True)
    factors = {name: size / max(start, 1.0) for name, size, start in sizes}
    return factors | {name: loss / UNIT_LOSS for name, loss in contribution.metrics.items()}


def is_suspect(own: Growth, max_growth: float) -> bool:
    """Whether an update has to be compared with the others of its round."""
    return max(own.values()) > max_growth


def outlier_reason(client: str, round_growth: Mapping[str, Growth], max_growth: float) -> str | None:
    """Return why a client is an outlier of its round, or None if it is not.

    Args:
        client: the client.
        round_growth: client → growth, of all usable updates of the round.
        max_growth: the largest allowed growth, and the largest allowed multiple of the median of the other clients.
    """
    for name, own in round_growth[client].items():
        others = [each[name] for other, each in round_growth.items() if other != client and name in each]
        median = median_low(others) if others else 0.0
        if own <= max_growth * max(1.0, median):
            continue
        if name not in Norms._fields:
            return f"its {name} is {own * UNIT_LOSS:.1e}, the median of the others is {median * UNIT_LOSS:.1e}"
        part = {"adapter": "the norm of its adapter", "heads": "the norm of its heads"}[name]
        return (
            f"{part} grew to {own:.1e} times what it was sent, the median of the others is {median:.1e} times; "
            f"expected at most {max_growth:g} times (federation.max_growth)"
        )
    return None
