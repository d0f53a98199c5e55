"""What a method carries from round to round."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedelta.lora.adapter import Adapter
from fedelta.lora.lowrank import Product

Patch = dict[str, Product]
"""Module → what a round adds to the base weight of that module."""


@dataclass(frozen=True, eq=False)
class MethodState:
    """What a method carries from round to round.

    Args:
        round: counted from 0.
        adapter: the global adapter at rank R, scale 1 (every s is absorbed into B).
        seed: that the current A was drawn from, at the start or at the last restart.
        memory: whatever tensors the method keeps for itself, name → tensor.
    """

    round: int
    adapter: Adapter
    seed: int = 0
    memory: Mapping[str, Tensor] = field(default_factory=dict)
