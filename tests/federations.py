"""Random federations in float64, and the dense matrices that they mean. Dense, obvious, slow: the oracle."""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from fedelta.lora.adapter import Adapter, LoraPair, draw_basis, lora_scale
from fedelta.lora.contribution import Contribution
from fedelta.lora.lowrank import LowRank, Product
from fedelta.methods import ClientView, Method, MethodState, make_method, methods

SHAPES = {"square": (6, 6), "tall": (9, 5), "wide": (4, 8)}
SEED = 11
VARIANTS = [(name, dict(options)) for name, method in methods().items() for options in ({}, *method.variants)]


def label(value: object) -> str:
    """A variant's name in a test's id."""
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items()) or "default"
    return getattr(value, "__name__", str(value))


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


@dataclass(frozen=True, eq=False)
class Client:
    """One client in one round.

    `start` and `trained` are at its own scale; `tail` is the dense part of the global product that it folded.
    """

    start: Adapter
    trained: Adapter
    tail: dict[str, Tensor]
    contribution: Contribution

    def weight(self, module: str) -> Tensor:
        """What it holds on top of the base after training."""
        return dense(self.trained[module]) + self.tail[module]


def state_of(method: Method, largest: int, rounds: int = 2) -> MethodState:
    """A state in the middle of a run, reached as a run reaches it: one client of the full rank has trained."""
    state = method.start(SHAPES, largest, SEED)
    state = replace(state, adapter=state.adapter.to(torch.float64))
    alone = Federation([largest], [1.0], [1.0], largest, SEED)
    kept: dict[str, Adapter] = {}
    for _ in range(rounds):
        state, _ = method.step(state, updates(train(method, state, alone, kept, size=1.0)))
    return state


def start(method: Method, federation: Federation) -> MethodState:
    return state_of(method, federation.largest, 2 + federation.seed % 2)


def train(
    method: Method,
    state: MethodState,
    federation: Federation,
    kept: dict[str, Adapter] | None = None,
    size: float = 0.5,
) -> list[Client]:
    """A round at the clients: they receive, change what the method trains by random amounts, finish and send.

    Args:
        kept: what clients have kept from earlier rounds; updated.
        size: standard deviation of the changes; 0 is nobody trains.
    """
    kept = {} if kept is None else kept
    generator = torch.Generator().manual_seed(federation.seed + 1 + state.round)
    plan = method.factors(state.round)
    clients = []
    for i, (rank, scale, weight) in enumerate(
        zip(federation.ranks, federation.scales, federation.weights, strict=True)
    ):
        name = f"client-{i}"
        client_start = method.personalize(state, ClientView(name, rank))
        sent = client_start.adapter.with_scale(scale)
        begun = sent
        if name in kept and "B" in plan.keep:
            mine = kept[name].with_scale(scale)
            begun = Adapter({m: LoraPair(pair.A, mine[m].B, scale) for m, pair in sent.items()})

        def change(module: str, pair: LoraPair) -> LoraPair:
            A, B = pair.A, pair.B
            if "A" in plan.train:
                A = A + size * torch.randn(A.shape, generator=generator, dtype=torch.float64)
            if "B" in plan.train:
                B = B + size * torch.randn(B.shape, generator=generator, dtype=torch.float64)
            if "core" in plan.train:
                Q = draw_basis(module, *B.shape, state.seed).double()
                B = B + size * Q @ torch.randn(pair.rank, pair.rank, generator=generator, dtype=torch.float64)
            return LoraPair(A, B, pair.scale)

        trained = method.finish(state.round, begun, Adapter({m: change(m, pair) for m, pair in begun.items()}))
        if plan.keep:
            kept[name] = trained
        # What a client does not send back, the server takes from what it sent.
        uploaded = Adapter(
            {
                m: LoraPair(
                    pair.A if "A" in plan.up else sent[m].A[: pair.rank],
                    pair.B if plan.up & {"B", "core"} else sent[m].B[:, : pair.rank],
                    pair.scale,
                )
                for m, pair in trained.items()
            }
        )
        tail = {
            m: dense(client_start.tail[m]) if m in client_start.tail else torch.zeros(shape, dtype=torch.float64)
            for m, shape in SHAPES.items()
        }
        clients.append(Client(begun, trained, tail, Contribution(name, weight, uploaded, client_start.indices)))
    return clients


def updates(clients: list[Client]) -> list[Contribution]:
    return [client.contribution for client in clients]


def dense(pair: LoraPair | Product) -> Tensor:
    """s·B·A, or U·V, written out."""
    if isinstance(pair, LowRank):
        return pair.U.double() @ pair.V.double()
    if isinstance(pair, LoraPair):
        return pair.scale * pair.B.double() @ pair.A.double()
    return pair.W.double()


def global_weight(state: MethodState, patch: dict[str, Product]) -> dict[str, Tensor]:
    """What the round leaves on top of the base before it: patch plus B·A."""
    return {m: dense(pair) + (dense(patch[m]) if m in patch else 0) for m, pair in state.adapter.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for module, matrix in expected.items():
        scale = max(1.0, float(matrix.abs().max()))
        assert torch.allclose(found[module], matrix, rtol=0, atol=tolerance * scale), module


def method_of(name: str, options: dict) -> Method:
    return make_method(name, **options)
