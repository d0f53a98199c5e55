"""Streaming: each client is added and dropped, so memory does not grow with the number of clients."""

import weakref
from collections.abc import Iterator

import pytest
import torch

from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.contribution import Contribution
from fedelta.lora.rank_moments import RankMoments
from fedelta.lora.running_sum import CHUNK
from fedelta.methods import Method, MethodState
from federations import VARIANTS, label, method_of

SHAPE = (40, 30)
RANKS = (1, 2, 4)


def contribution(i: int, method: Method) -> Contribution:
    generator = torch.Generator().manual_seed(i)
    r = RANKS[i % 3] if method.mixed_ranks else 4
    pair = LoraPair(torch.randn(r, SHAPE[1], generator=generator), torch.randn(SHAPE[0], r, generator=generator), 2 / r)
    indices = torch.randperm(4, generator=generator)[:r].sort().values if method.name == "fed-plora" else None
    return Contribution(f"client-{i}", 1.0 + i % 5, Adapter({"x": pair}), indices)


def start(method: Method) -> MethodState:
    return method.start({"x": SHAPE}, 4, 0)


def ranks(known: bool = True) -> frozenset[int]:
    return frozenset(RANKS) if known else frozenset()


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=label)
def test_every_method_drops_a_client_before_it_reads_the_one_after_the_next(name: str, options: dict) -> None:
    method = method_of(name, options)
    references: list[weakref.ref] = []
    max_alive = 0

    def stream() -> Iterator[Contribution]:
        nonlocal max_alive
        for i in range(40):
            each = contribution(i, method)
            references.append(weakref.ref(each.adapter["x"].B))
            yield each
            del each
            max_alive = max(max_alive, sum(reference() is not None for reference in references))

    method.step(start(method), stream(), ranks())
    assert max_alive <= (40 if method.remembers_clients else 1)


def tensor_bytes(moments: RankMoments) -> int:
    """Size in bytes of all tensors that the moments refer to."""
    seen: dict[int, int] = {}
    stack: list[object] = [moments]
    visited = set()
    while stack:
        each = stack.pop()
        if id(each) in visited:
            continue
        visited.add(id(each))
        if isinstance(each, torch.Tensor):
            seen[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        elif isinstance(each, dict):
            stack += each.values()
        elif isinstance(each, list | tuple):
            stack += each
        elif hasattr(each, "__dict__"):
            stack += vars(each).values()
    return sum(seen.values())


@pytest.mark.parametrize("kind", ["none", "total", "by rank"])
@pytest.mark.parametrize("known", [True, False])
def test_memory_stops_growing_once_a_dense_sum_is_smaller(kind: str, known: bool) -> None:
    method = method_of("fedex", {})
    sizes = []
    for clients in (60, 600):
        state = start(method)
        stream = (contribution(i, method) for i in range(clients))
        sizes.append(tensor_bytes(RankMoments(state.adapter, stream, kind, ranks(known))))  # type: ignore[arg-type]
    blocks = {"none": 0, "total": 1, "by rank": 3 if known else 4}[kind]
    dense, chunk = 4 * SHAPE[0] * SHAPE[1], 4 * (CHUNK + 4) * sum(SHAPE)
    factors = 2 * 4 * 4 * sum(SHAPE) + 2 * 8 * 4 * sum(SHAPE)
    # 4096 bytes for the column indices of the pending terms.
    assert sizes[1] <= factors + blocks * (dense + 2 * chunk) + 4096
    assert sizes[1] <= sizes[0] + blocks * 2 * chunk


@pytest.mark.parametrize("known", [True, False])
def test_blocks_by_known_ranks_and_by_index_give_the_same_covariance(known: bool) -> None:
    """This also holds when every block has become dense."""
    method = method_of("fedex", {})
    for clients in (5, 300):
        stream = [contribution(i, method) for i in range(clients)]
        state = start(method)
        moments = RankMoments(state.adapter, stream, "by rank", ranks(known))
        normalized = torch.zeros(SHAPE)
        moments.normalized_covariance("x").add_to(normalized)
        expected = torch.zeros(SHAPE, dtype=torch.float64)
        for j in range(4):
            holders = [c for c in stream if c.adapter["x"].rank > j]
            mass = sum(c.weight for c in holders)
            b = torch.stack([c.adapter["x"].scale * c.adapter["x"].B[:, j].double() for c in holders])
            a = torch.stack([c.adapter["x"].A[j].double() for c in holders])
            p = torch.tensor([c.weight / mass for c in holders], dtype=torch.float64)[:, None]
            expected += (p * (b - (p * b).sum(0))).T @ (a - (p * a).sum(0))
        assert torch.allclose(normalized.double(), expected, atol=1e-5)
        total = torch.zeros(SHAPE)
        moments.covariance("x").add_to(total)
        plain = torch.zeros(SHAPE)
        RankMoments(state.adapter, stream, "total").covariance("x").add_to(plain)
        assert torch.allclose(total, plain, atol=1e-5)


def test_a_client_of_weight_zero_changes_nothing() -> None:
    method = method_of("fedex", {})
    clients = [contribution(i, method) for i in range(4)]
    silent = Contribution("silent", 0.0, Adapter({"x": LoraPair(torch.full((4, 30), 9.0), torch.full((40, 4), 9.0))}))
    one, patch_one = method.step(start(method), clients, ranks())
    two, patch_two = method.step(start(method), [silent, *clients], ranks())
    assert torch.equal(one.adapter["x"].B, two.adapter["x"].B)
    assert torch.equal(patch_one["x"].U, patch_two["x"].U)


def test_scales_that_are_not_powers_of_two_do_not_cost_digits() -> None:
    """Rounding s·B to fp32 before the subtraction would cause a relative error of 1e-7/spread in the residual."""
    generator = torch.Generator().manual_seed(0)
    B0, A0 = torch.randn(40, 4, generator=generator), torch.randn(4, 30, generator=generator)
    clients = []
    for i, scale in enumerate((1.7, 0.3, 1.7, 2.9, 0.3)):
        A = A0 + 1e-4 * torch.randn(4, 30, generator=generator)
        B = (B0 + 1e-4 * torch.randn(40, 4, generator=generator)).double() / scale
        clients.append(Contribution(str(i), 1.0, Adapter({"x": LoraPair(A, B.float(), scale)})))
    pairs = [c.adapter["x"] for c in clients]
    B, A = (
        torch.stack([pair.scale * pair.B.double() for pair in pairs]),
        torch.stack([pair.A.double() for pair in pairs]),
    )
    exact = torch.einsum("kmr,krn->mn", B - B.mean(0), A - A.mean(0)) / len(pairs)
    _, patch = method_of("fedex", {}).step(start(method_of("fedex", {})), clients, ranks())
    residual = patch["x"].U.double() @ patch["x"].V.double()
    assert (residual - exact).norm() < 1e-6 * exact.norm()
