"""FedEx-LoRA's other assignment strategies (2410.09432): clients continue from their own factors.

After aggregation, FedEx gives every client the means B̄, Ā. Here, client i starts its next round from its own A_i, its
own B_i, or both. It trains on an adjusted base for that round, so that all clients start from the same effective
weight:

    W_i = W + B̄ Ā − B_start A_start,      (B_start, A_start) one of (B̄, A_i), (B_i, Ā), (B_i, A_i)

The global model is W + B̄ Ā, as in FedEx. The change of client i is B_i A_i − B_start A_start, so exactness requires

    W ← W + [Σ p_i B_i A_i − B̄ Ā]_new + Σ p_i (B̄ Ā − B_start A_start)

The second sum is zero if one factor is kept and all clients take part. The paper's other strategies are FedEx itself
(average) and FedEx with `refresh: 1` (re-initialize).

The server stores each client's last factors and sends them back, with the difference as a tail. A client that stored
them itself would save those bytes, so byte counts of this method are not meaningful.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch

from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.contribution import Contribution
from fedelta.lora.lowrank import LowRank, Product, add
from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import register
from fedelta.methods.method import ClientStart, ClientView, Method, Properties
from fedelta.methods.state import MethodState

_KEPT = "kept"


class _Remembered(RankMoments):
    """Moments together with their contributions."""

    def __init__(self, *arguments: Any) -> None:
        self.contributions: list[Contribution] = []
        super().__init__(*arguments)

    def add(self, contribution: Contribution) -> None:
        super().add(contribution)
        self.contributions.append(contribution)


@register
class FedExKeep(Method):
    """FedEx-LoRA with kept factors.

    Args:
        keep: factors that a client keeps: `A`, `B` or `both`.
    """

    keep: Literal["A", "B", "both"] = "both"

    name = "fedex-keep"
    paper = "FedEx-LoRA, arXiv 2410.09432: assignment strategies"
    summary = "FedEx with clients that continue from their own factors, on a base adjusted for the difference"
    properties = Properties(exact="always", no_op_invariant="always")
    mixed_ranks = False
    remembers_clients = True
    covariance = "total"
    refused = (
        ("norm_weighting", "the patch weights the clients' starting points, too"),
        ("refresh", "clients would continue from the factors that they kept"),
        ("residual_step", "it would scale the part of the patch that belongs to the clients' starting points, too"),
    )
    offline = "clients continue from factors of earlier rounds"
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
            last = own[module]
            if last is None:
                return ClientStart(state.adapter)
            if self.keep == "A":
                pairs[module] = LoraPair(last.A, mean.B)
                tail[module] = LowRank(mean.B, mean.A - last.A)
            elif self.keep == "B":
                pairs[module] = LoraPair(mean.A, last.B)
                tail[module] = LowRank(mean.B - last.B, mean.A)
            else:
                pairs[module] = last
                U = torch.cat([mean.B, mean.B - last.B], dim=1)
                tail[module] = LowRank(U, torch.cat([mean.A - last.A, last.A]))
        return ClientStart(Adapter(pairs), tail)

    def exact_mean(self, state: MethodState, moments: RankMoments, module: str) -> None:  # noqa: ARG002
        # The step adds the mean of changes from starting points that differ, not a mean of products.
        return None

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
        # With the tails, the width of the sum exceeds its rank.
        patch = {module: product.recompress() for module, product in patch.items()}
        patch = {module: product for module, product in patch.items() if not product.is_zero()}
        return replace(state, adapter=moments.means(), memory=memory), patch


def _own(state: MethodState, client: str, module: str) -> LoraPair | None:
    """Return the last pair that this client sent, or None if it has not taken part."""
    A, B = (state.memory.get(f"{_KEPT}/{client}/{module}/{factor}") for factor in "AB")
    return None if A is None or B is None else LoraPair(A, B)
