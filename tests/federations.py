"""Random federations in float64 and their dense matrices: a slow and obvious oracle."""

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
    """Name of a variant in the id of a test."""
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
        """Normalized weights p_i."""
        return [w / sum(self.weights) for w in self.weights]


@st.composite
def federations(draw: st.DrawFn, mixed: bool = True, max_clients: int = 5) -> Federation:
    """Draw a federation: ranks from 1 to 4, mixed α under α/r and α/√r, unequal weights, and possibly one client.

    With mixed ranks, the server's rank may exceed the rank of every client, so that no client holds the last index.
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

    Args:
        start, trained: adapter before and after training, at the client's scale.
        tail: module → dense part of the global product that the client added to its base.
        contribution: what the server receives.
    """

    start: Adapter
    trained: Adapter
    tail: dict[str, Tensor]
    contribution: Contribution

    def weight(self, module: str) -> Tensor:
        """Return the client's weight after training, minus the base."""
        return dense(self.trained[module]) + self.tail[module]


def state_of(method: Method, largest: int, rounds: int = 2) -> MethodState:
    """Return a state in the middle of a run, after `rounds` rounds of one client of full rank."""
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
    """Simulate the clients of a round. They change the factors that the method trains by random amounts.

    Args:
        kept: client → adapter that it kept from earlier rounds; updated in place.
        size: standard deviation of the changes; 0 means that no client trains.
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
        begin = sent
        if name in kept and "B" in plan.keep:
            own = kept[name].with_scale(scale)
            begin = Adapter({m: LoraPair(pair.A, own[m].B, scale) for m, pair in sent.items()})

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

        trained = method.finish(state.round, begin, Adapter({m: change(m, pair) for m, pair in begin.items()}))
        if plan.keep:
            kept[name] = trained
        # The server takes the factors that a client does not send back from its broadcast.
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
        clients.append(Client(begin, trained, tail, Contribution(name, weight, uploaded, client_start.indices)))
    return clients


def updates(clients: list[Client]) -> list[Contribution]:
    return [client.contribution for client in clients]


def dense(pair: LoraPair | Product) -> Tensor:
    """Return s·B·A or U·V as a dense matrix."""
    if isinstance(pair, LowRank):
        return pair.U.double() @ pair.V.double()
    if isinstance(pair, LoraPair):
        return pair.scale * pair.B.double() @ pair.A.double()
    return pair.W.double()


def global_weight(state: MethodState, patch: dict[str, Product]) -> dict[str, Tensor]:
    """Return the global weight minus the base before the round: patch plus B·A."""
    return {m: dense(pair) + (dense(patch[m]) if m in patch else 0) for m, pair in state.adapter.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for module, matrix in expected.items():
        scale = max(1.0, float(matrix.abs().max()))
        assert torch.allclose(found[module], matrix, rtol=0, atol=tolerance * scale), module


def method_of(name: str, options: dict) -> Method:
    return make_method(name, **options)
