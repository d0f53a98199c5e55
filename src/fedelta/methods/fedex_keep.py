"""FedEx-LoRA's other assignments (2410.09432, «assignment strategies»): clients go on with factors of their own.

After aggregation FedEx gives every client the means B̄, Ā. Here client i starts its next round from its own A_i, its
own B_i, or both, and trains on a base of its own for that round, so that all begin with the same effective weight:

    W_i = W + B̄ Ā − B_start A_start,      (B_start, A_start) one of (B̄, A_i), (B_i, Ā), (B_i, A_i)

The global model is W + B̄ Ā, as in FedEx. What clients change is B_i A_i − B_start A_start, so that exactness asks for

    W ← W + [Σ p_i B_i A_i − B̄ Ā]_new + Σ p_i (B̄ Ā − B_start A_start)

of which the second sum is zero where one factor is kept and all clients take part. The paper's other strategies are
FedEx itself (average) and FedEx with `refresh: 1` (re-initialize).

The server remembers each client's last factors and sends them back, with the difference as a tail; a client that kept
them itself would save those bytes, so bytes of this method say nothing.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch

from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.contribution import Contribution
from fedelta.lora.lowrank import LowRank, Product, add
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import ClientStart, ClientView, Method, Properties
from fedelta.methods.state import MethodState, Patch

_KEPT = "kept"


class _Remembered(RankMoments):
    """Moments, and the contributions that they are of."""

    def __init__(self, *arguments: Any) -> None:
        self.contributions: list[Contribution] = []
        super().__init__(*arguments)

    def add(self, contribution: Contribution) -> None:
        super().add(contribution)
        self.contributions.append(contribution)


@register
class FedExKeep(Method):
    """Options: which factors a client keeps, out of A, B and both."""

    keep: Literal["A", "B", "both"] = "both"

    name = "fedex-keep"
    paper = "FedEx-LoRA, arXiv 2410.09432: assignment strategies"
    summary = "FedEx whose clients go on from factors of their own, on a base that makes up for it"
    properties = Properties(exact="always", no_op_invariant="always")
    mixed_ranks = False
    remembers_clients = True
    covariance = "total"
    refused = (
        ("norm_weighting", "what clients started from is weighed too"),
        ("refresh", "clients would go on from what they kept"),
        ("residual_step", "it would step over what clients started from too"),
    )
    offline = "clients go on from factors of earlier rounds"
    variants = ({"keep": "A"}, {"keep": "B"})

    def fold(
        self,
        state: MethodState,
        contributions: Iterable[Contribution],
        measured: bool = False,  # noqa: ARG002
        ranks: frozenset[int] = frozenset(),
    ) -> RankMoments:
        return _Remembered(state.adapter, contributions, self.covariance, ranks)

    def personalize(self, state: MethodState, client: ClientView) -> ClientStart:
        own = {module: _own(state, client.id, module) for module in state.adapter}
        pairs, tail = {}, {}
        for module, mean in state.adapter.items():
            kept = own[module]
            if kept is None:
                return ClientStart(state.adapter)
            if self.keep == "A":
                pairs[module] = LoraPair(kept.A, mean.B)
                tail[module] = LowRank(mean.B, mean.A - kept.A)
            elif self.keep == "B":
                pairs[module] = LoraPair(mean.A, kept.B)
                tail[module] = LowRank(mean.B - kept.B, mean.A)
            else:
                pairs[module] = kept
                U = torch.cat([mean.B, mean.B - kept.B], dim=1)
                tail[module] = LowRank(U, torch.cat([mean.A - kept.A, kept.A]))
        return ClientStart(Adapter(pairs), tail)

    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        assert isinstance(moments, _Remembered)
        total = sum(c.weight for c in moments.contributions)
        patch: dict[str, Product] = {module: moments.covariance(module) for module in state.adapter}
        memory = dict(state.memory)
        for c in moments.contributions:
            tail = self.personalize(state, ClientView(c.client, c.adapter.rank)).tail
            for module, pair in c.adapter.items():
                if module in tail:
                    patch[module] = add([patch[module], tail[module].scaled(c.weight / total)])
                own = pair.with_scale(1.0)
                memory |= {f"{_KEPT}/{c.client}/{module}/A": own.A, f"{_KEPT}/{c.client}/{module}/B": own.B}
        # Tails add width that the sum does not have as rank.
        patch = {module: product.recompress() for module, product in patch.items()}
        patch = {module: product for module, product in patch.items() if not product.is_zero()}
        return replace(state, adapter=moments.means(), memory=memory), patch


def _own(state: MethodState, client: str, module: str) -> LoraPair | None:
    """What this client sent last, if it took part before."""
    A, B = (state.memory.get(f"{_KEPT}/{client}/{module}/{factor}") for factor in "AB")
    return None if A is None or B is None else LoraPair(A, B)
