"""Weights of adapter folders: of a mean, where they are shares, or of a sum, where they count as they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedelta.errors import FedeltaError, quantity


@dataclass(frozen=True)
class Weights:
    """Checked weights.

    Args:
        values: w_i as given.
        scaled: w_i·2⁻ᵏ. The largest one lies between 1/2 and 1, so that sums neither overflow nor underflow.
            A power of two changes no digit.
        exponent: k.
        as_sum: whether the result is Σ w_i ΔW_i (`--sum`), and not Σ w_i ΔW_i / Σ w_i.
    """

    values: tuple[float, ...]
    scaled: tuple[float, ...]
    exponent: int
    as_sum: bool

    def shares(self) -> list[float]:
        """The factor of each folder: w_i / Σ w of a mean, w_i of a sum."""
        if self.as_sum:
            return list(self.values)
        whole = math.fsum(self.scaled)
        return [weight / whole for weight in self.scaled]

    @property
    def factor(self) -> float:
        """2ᵏ, by which a sum of scaled weights must be multiplied; infinite if a result would not be finite anyway."""
        try:
            return math.ldexp(1.0, self.exponent)
        except OverflowError:
            return math.inf


def scaled_weights(values: Sequence[float], as_sum: bool = False) -> Weights:
    """Scale weights that are finite and not all zero."""
    exponent = max(math.frexp(weight)[1] for weight in values if weight)
    return Weights(tuple(values), tuple(math.ldexp(weight, -exponent) for weight in values), exponent, as_sum)


def check_weights(names: Sequence[str], values: Sequence[float] | None, as_sum: bool) -> Weights:
    """Check one weight per folder.

    Args:
        names: the folders.
        values: w_i; None weighs all folders by 1.
        as_sum: whether the result is a sum, which may have negative weights.

    Raises:
        FedeltaError: naming the weight and what was expected.
    """
    values = [1.0] * len(names) if values is None else [float(value) for value in values]
    if len(values) != len(names):
        raise FedeltaError(
            f"{quantity(len(values), 'weight')}, expected one for each of {quantity(len(names), 'folder')}"
        )
    for weight, name in zip(values, names, strict=True):
        if not math.isfinite(weight):
            raise FedeltaError(f"weight {weight} of {name}: expected a finite number")
        if weight < 0 and not as_sum:
            raise FedeltaError(
                f"weight {weight:g} of {name}: expected a number ≥ 0 for a mean; --sum takes weights as they are"
            )
    if not any(values):
        raise FedeltaError(f"all weights are 0, expected {'another weight' if as_sum else 'a positive sum'}")
    return scaled_weights(values, as_sum)
