"""FedRot-LoRA (2602.23638): clients rotate their factors toward the global ones before the average.

With Q orthogonal, B→BQ, A→QᵀA does not change the product, but it changes the means of the factors. After training, a
client aligns its factors with the adapter (B⁰, A⁰) that it received:

    odd rounds:   Q = argmin ‖QᵀA_i − A⁰‖_F,   the orthogonal polar factor of A_i A⁰ᵀ
    even rounds:  Q = argmin ‖B_iQ − B⁰‖_F,    the orthogonal polar factor of B_iᵀB⁰
    soft:         Q_λ = polar((1 − λ) I + λ Q)

It sends B_iQ_λ and Q_λᵀA_i, and the server averages them as FedIT does. Round 0 is not rotated (B⁰ = 0). This and the
order of the rounds follow the authors' code. The default λ = 1, the full rotation, is our choice. If λ < 1, Q must be
a rotation (det 1), because no path of rotations leads to a reflection. Equal ranks only.
"""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState


def nearest_orthogonal(M: Tensor, rotation: bool = False) -> Tensor:
    """Return the orthogonal factor of the polar decomposition of M, (r, r).

    Args:
        M: shape (r, r).
        rotation: return the nearest matrix with determinant 1 instead.
    """
    left, _, right = torch.linalg.svd(M)
    if rotation and float(torch.linalg.det(left @ right)) < 0:
        left = torch.cat([left[:, :-1], -left[:, -1:]], dim=1)
    return left @ right


@register
class FedRot(Method):
    """FedRot-LoRA.

    Args:
        strength: λ, the part of the rotation that clients apply, in [0, 1].
    """

    strength: Annotated[float, Field(ge=0, le=1)] = 1.0

    name = "fedrot"
    paper = "FedRot-LoRA, arXiv 2602.23638"
    summary = "clients rotate their factors toward the global ones, then the mean of each"
    mixed_ranks = False
    properties = Properties()
    variants = ({"strength": 0.5},)
    offline = "clients rotate toward the adapter that they received, which folders do not contain; the rest is fedit"

    def finish(self, round: int, start: Adapter, trained: Adapter) -> Adapter:
        if round == 0 or self.strength == 0:
            return trained
        return Adapter({module: self._rotate(round, start[module], pair) for module, pair in trained.items()})

    def _rotate(self, round: int, start: LoraPair, pair: LoraPair) -> LoraPair:
        A, B = pair.A.double(), pair.B.double()
        soft = self.strength < 1
        Q = nearest_orthogonal(A @ start.A.double().T if round % 2 else B.T @ start.B.double(), rotation=soft)
        if soft:
            Q = nearest_orthogonal((1 - self.strength) * torch.eye(pair.rank, dtype=Q.dtype) + self.strength * Q)
        return LoraPair((Q.T @ A).to(pair.A.dtype), (B @ Q).to(pair.B.dtype), pair.scale)

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        return replace(state, adapter=moments.means()), {}
