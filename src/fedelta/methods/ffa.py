"""FFA-LoRA (Sun et al., 2403.12313): A is drawn once and frozen, clients train B.

    A_i = A⁰[:r_i]        b_j ← b_j + Σ_{S_j} p_i (s_i b_ij − b_j)

With a shared A the mean of products is the product of the mean, Σ p_i s_i B_i A = B̄ A, so the average is
exact. The paper has equal ranks. At mixed ranks we let a client that does not hold index j count as
unchanged there, which keeps the step exact: the new weight is the old one plus Σ p_i × what client i changed.

A is never sent: each client draws it from the seed (`draw_A`), which halves the traffic in both directions.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from fedelta.adapter import Adapter, LoraPair, Shapes
from fedelta.lowrank import LowRank
from fedelta.methods import register
from fedelta.methods.method import Contribution, Method, MethodState, Tailored
from fedelta.methods.rank_sums import RankSums

SEED = "seed_A"


@register
class FFA(Method):
    name = "ffa"
    paper = "FFA-LoRA, arXiv 2403.12313"
    summary = "A frozen at its initial draw, mean of B; exact, half the bytes, fewer directions"
    mixed_ranks = True
    exact = "always"
    no_op_invariant = "always"
    gauge_invariant = "never"
    reduces_to_fedit = "equal ranks"
    linear = True

    def start(self, shapes: Shapes, rank: int, seed: int) -> MethodState:
        return replace(super().start(shapes, rank, seed), memory={SEED: torch.tensor(seed)})

    def trainable(self, round: int) -> frozenset[str]:  # noqa: ARG002
        return frozenset({"B"})

    def tailor(self, state: MethodState, rank: int) -> Tailored:
        return Tailored(state.adapter.truncate(rank), int(state.memory[SEED]))

    def absent(self, before: MethodState, after: MethodState) -> Adapter:  # noqa: ARG002
        return before.adapter

    def aggregate(
        self, state: MethodState, contributions: Iterable[Contribution]
    ) -> tuple[MethodState, dict[str, LowRank]]:
        sums = RankSums.of(state.adapter, contributions)
        mean_B = {module: pair.B for module, pair in sums.contributor_means().items()}
        pairs = {}
        for module, before in state.adapter.items():
            c = sums.share(module)  # (R,)
            # Σ_{S_j} p_i (b_ij − b_j) = c_j (b̄_j − b_j)
            B = torch.where(c == 1, mean_B[module], before.B + c.to(before.B.dtype) * (mean_B[module] - before.B))
            pairs[module] = LoraPair(before.A, B)
        return replace(state, adapter=Adapter(pairs)), {}
