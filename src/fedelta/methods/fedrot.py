"""FedRot-LoRA (2602.23638): clients turn their factors towards the global ones before the average.

A product does not change under B→BQ, A→QᵀA with Q orthogonal, but means of factors do. After training, a client aligns
itself with the adapter (B⁰, A⁰) that it was sent:

    odd rounds:   Q = argmin ‖QᵀA_i − A⁰‖_F,   the orthogonal polar factor of A_i A⁰ᵀ
    even rounds:  Q = argmin ‖B_iQ − B⁰‖_F,    that of B_iᵀB⁰
    soft:         Q_λ = polar((1 − λ) I + λ Q)

and sends B_iQ_λ, QᵀA_i; the server averages as FedIT. Round 0 is not turned (B⁰ = 0), as in the authors' code, whose
order of rounds this is; λ = 1, all the way, is our default. Q is taken as a rotation (det 1) when λ < 1, because there
is no path of rotations to a reflection. Equal ranks.
"""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import Method, Properties
from fedelta.methods.state import MethodState, Patch


def nearest_orthogonal(M: Tensor, rotation: bool = False) -> Tensor:
    """The orthogonal factor of M's polar decomposition, (r, r); a rotation if asked."""
    left, _, right = torch.linalg.svd(M)
    if rotation and float(torch.linalg.det(left @ right)) < 0:
        left = torch.cat([left[:, :-1], -left[:, -1:]], dim=1)
    return left @ right


@register
class FedRot(Method):
    """Options: λ, how far clients turn."""

    strength: Annotated[float, Field(ge=0, le=1)] = 1.0

    name = "fedrot"
    paper = "FedRot-LoRA, arXiv 2602.23638"
    summary = "clients rotate their factors towards the global ones, then the mean of each"
    mixed_ranks = False
    properties = Properties()
    variants = ({"strength": 0.5},)
    offline = "clients rotate towards the adapter that they were sent, which folders do not hold; the rest is fedit"

    def finish(self, round: int, start: Adapter, trained: Adapter) -> Adapter:
        if round == 0 or self.strength == 0:
            return trained
        return Adapter({module: self._turn(round, start[module], pair) for module, pair in trained.items()})

    def _turn(self, round: int, start: LoraPair, pair: LoraPair) -> LoraPair:
        A, B = pair.A.double(), pair.B.double()
        soft = self.strength < 1
        Q = nearest_orthogonal(A @ start.A.double().T if round % 2 else B.T @ start.B.double(), rotation=soft)
        if soft:
            Q = nearest_orthogonal((1 - self.strength) * torch.eye(pair.rank, dtype=Q.dtype) + self.strength * Q)
        return LoraPair((Q.T @ A).to(pair.A.dtype), (B @ Q).to(pair.B.dtype), pair.scale)

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        return replace(state, adapter=moments.means()), {}
