"""`Contribution`: one client's part in a round, with the factors that it did not train filled in."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedelta.lora.adapter import Adapter


@dataclass(frozen=True, eq=False)
class Contribution:
    """A validated update of one client, with its frozen factors filled in.

    Args:
        client: id of the client.
        weight: w_i, not normalized.
        adapter: s_i·B_i·A_i of every module.
        indices: rank indices of the global adapter that the client trained, (r_i,); None means the first r_i.
        heads: name → tensor, the trained modules outside LoRA.
        metrics: name → finite number.
    """

    client: str
    weight: float
    adapter: Adapter
    indices: Tensor | None = None
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
