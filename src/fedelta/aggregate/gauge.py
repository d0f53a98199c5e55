"""Factors of like size in all folders.

s·B·A stays the same if row j of A grows by a factor and column j of B shrinks by it. Adapters of one training have rows
of like size. If they differ by orders of magnitude, means of factors and their covariance lose the digits of the
smaller ones. Rows are then multiplied by a power of two, which changes no digit.
"""

import torch
from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.contribution import Contribution

RESCALED = 4
"""Rows that differ by more than this power of two are rescaled; about one digit is lost below it."""

REFUSED = 12
"""A method averages the factors as they are. Beyond this power of two, half of fp32's digits would be lost."""

_COMMON = 60
"""Rows of the first folder are brought to between 2⁻⁶⁰ and 2⁶⁰, far from the ends of fp32."""


class Gauge:
    """Brings the rows of A of each folder to the size that they have in the first folder with that row.

    Args:
        averaged: name of the method that averages factors; None for an exact mean or sum, which may rescale them.

    Attributes:
        rescaled: modules with a row that was rescaled.
    """

    def __init__(self, averaged: str | None) -> None:
        self._averaged = averaged
        self._targets: dict[str, Tensor] = {}  # log2 of the size of each row; NaN if no folder had it
        self.rescaled: set[str] = set()

    def align(self, contribution: Contribution) -> Contribution:
        """Return a contribution with the same products and rows of the common size.

        Raises:
            FedeltaError: if a method would average rows of very different size.
        """
        pairs = {module: self._aligned(contribution.client, module, p) for module, p in contribution.adapter.items()}
        return Contribution(contribution.client, contribution.weight, Adapter(pairs))

    def _aligned(self, client: str, module: str, pair: LoraPair) -> LoraPair:
        size = torch.linalg.vector_norm(pair.A.double(), torch.inf, dim=1).log2()  # −∞ of a row of zeros
        size[~torch.isfinite(size)] = torch.nan
        known = self._targets.get(module, torch.empty(0, dtype=torch.float64))
        known = torch.nn.functional.pad(known, (0, max(0, pair.rank - len(known))), value=torch.nan)
        own = size if self._averaged else size.clamp(-_COMMON, _COMMON)
        mine = known[: pair.rank]
        target = torch.where(mine.isnan(), own, mine)
        known[: pair.rank] = target
        self._targets[module] = known
        power = (target - size).round().nan_to_num(0.0)
        far = power.abs() > (REFUSED if self._averaged else RESCALED)
        if not bool(far.any()):
            return pair
        if self._averaged:
            raise FedeltaError(
                f"{client}: module {module}: rows of A differ by a factor of 2^{int(power.abs().max())} from the other "
                f"folders: {self._averaged} averages factors, which would lose their digits; the exact mean does not"
            )
        self.rescaled.add(module)
        factor = torch.exp2(torch.where(far, power, 0.0))
        A = (pair.A.double() * factor[:, None]).to(pair.A.dtype)
        B = (pair.B.double() / factor).to(pair.B.dtype)
        if bool(pair.B.any()) and not bool(B.any()):
            raise FedeltaError(f"{client}: module {module}: the update is too small for fp32")
        return LoraPair(A, B, pair.scale)
