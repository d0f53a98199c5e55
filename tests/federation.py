"""Random federations in float64, and the dense matrices that they mean. Dense, obvious, slow: the oracle."""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from fedelta.adapter import Adapter, LoraPair, lora_scale
from fedelta.contribution import Contribution
from fedelta.lowrank import LowRank
from fedelta.methods import Method, MethodState

SHAPES = {"square": (6, 6), "tall": (9, 5), "wide": (4, 8)}
SEED = 11


@dataclass(frozen=True)
class Federation:
    """Ranks, scales and weights of the clients of a round."""

    ranks: list[int]
    scales: list[float]
    weights: list[float]
    largest: int
    seed: int

    @property
    def p(self) -> list[float]:
        return [w / sum(self.weights) for w in self.weights]


@st.composite
def federations(draw: st.DrawFn, mixed: bool = True, max_clients: int = 5) -> Federation:
    """Mixed or equal ranks from 1 on, mixed α under α/r and α/√r, unequal weights, sometimes one client.

    With mixed ranks the server's rank may exceed every client's: indices that nobody holds.
    """
    clients = draw(st.integers(1, max_clients))
    if mixed:
        ranks = [draw(st.integers(1, 4)) for _ in range(clients)]
        largest = max(ranks) + draw(st.integers(0, 1))
    else:
        ranks = [draw(st.integers(1, 4))] * clients
        largest = ranks[0]
    scales = [
        lora_scale(draw(st.sampled_from([1.0, 4.0, 16.0])), r, draw(st.sampled_from(["alpha/r", "alpha/sqrt(r)"])))
        for r in ranks
    ]
    weights = [float(draw(st.integers(1, 50))) for _ in range(clients)]
    return Federation(ranks, scales, weights, largest, draw(st.integers(0, 10_000)))


def double(adapter: Adapter) -> Adapter:
    return adapter.map(lambda pair: LoraPair(pair.A.double(), pair.B.double(), pair.scale))


def start(method: Method, federation: Federation) -> MethodState:
    """A state in the middle of a run: B is not zero. A is left as drawn, since FFA's clients draw it too."""
    generator = torch.Generator().manual_seed(federation.seed)
    state = method.start(SHAPES, federation.largest, SEED)
    adapter = double(state.adapter).map(
        lambda pair: LoraPair(pair.A, torch.randn(pair.B.shape, generator=generator, dtype=torch.float64))
    )
    return replace(state, adapter=adapter)


def received(method: Method, state: MethodState, federation: Federation) -> list[Adapter]:
    """What each client starts from, at its own scale."""
    return [
        method.tailor(state, r).adapter.with_scale(s) for r, s in zip(federation.ranks, federation.scales, strict=True)
    ]


def train(method: Method, state: MethodState, federation: Federation, size: float = 0.5) -> list[Contribution]:
    """Random changes of the factors that the method trains."""
    generator = torch.Generator().manual_seed(federation.seed + 1)
    trainable = method.trainable(state.round)

    def change(pair: LoraPair) -> LoraPair:
        A, B = (
            factor + size * torch.randn(factor.shape, generator=generator, dtype=torch.float64)
            if name in trainable
            else factor
            for name, factor in (("A", pair.A), ("B", pair.B))
        )
        return LoraPair(A, B, pair.scale)

    return contributions(federation, [a.map(change) for a in received(method, state, federation)])


def contributions(federation: Federation, adapters: list[Adapter]) -> list[Contribution]:
    return [
        Contribution(f"client-{i}", w, a) for i, (w, a) in enumerate(zip(federation.weights, adapters, strict=True))
    ]


def dense(pair: LoraPair | LowRank) -> Tensor:
    """s·B·A, or U·V, written out."""
    if isinstance(pair, LowRank):
        return pair.U.double() @ pair.V.double()
    return pair.scale * pair.B.double() @ pair.A.double()


def global_weight(state: MethodState, patch: dict[str, LowRank]) -> dict[str, Tensor]:
    """What the round leaves on top of the base before it: patch plus B·A."""
    return {m: dense(pair) + (dense(patch[m]) if m in patch else 0) for m, pair in state.adapter.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for module, matrix in expected.items():
        scale = max(1.0, float(matrix.abs().max()))
        assert torch.allclose(found[module], matrix, rtol=0, atol=tolerance * scale), module
