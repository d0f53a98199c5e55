"""State of a method between rounds."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedelta.lora.adapter import Adapter


@dataclass(frozen=True, eq=False)
class MethodState:
    """Everything that a method carries from one round to the next.

    Args:
        round: number of the round, from 0.
        adapter: the global adapter at rank R and scale 1 (every s is absorbed into B).
        seed: seed of the current A, which was drawn at the start or at the last restart.
        memory: name → tensor that the method stores for itself.
    """

    round: int
    adapter: Adapter
    seed: int = 0
    memory: Mapping[str, Tensor] = field(default_factory=dict)
