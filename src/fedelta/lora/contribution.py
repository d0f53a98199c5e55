"""What one client contributes to a round: its checked update, complete with the factors that were frozen."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedelta.lora.adapter import Adapter


@dataclass(frozen=True, eq=False)
class Contribution:
    """An update that has passed the door, complete with the factors that were frozen.

    Args:
        client: its id.
        weight: w_i, not normalized.
        adapter: s_i·B_i·A_i of every module.
        indices: which rank indices of the global adapter it trained, (r_i,); None is the first r_i.
        heads: name → tensor.
        metrics: finite numbers by name.
    """

    client: str
    weight: float
    adapter: Adapter
    indices: Tensor | None = None
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
