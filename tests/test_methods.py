"""Each method's step against a dense float64 oracle, written rank index by rank index from its equation."""

import pytest
import torch
from hypothesis import given
from torch import Tensor

from fedelta.adapter import Adapter, LoraPair
from fedelta.contribution import Contribution
from fedelta.errors import FedeltaError
from fedelta.methods import make_method, methods
from fedelta.methods.fedex import residual
from federation import Federation, assert_same, contributions, dense, federations, global_weight, received, start, train


def mean_over(federation: Federation, trained: list[Contribution], module: str, j: int) -> tuple[Tensor, Tensor, float]:
    """(Σ_{S_j} p_i s_i b_ij, Σ_{S_j} p_i a_ij, c_j) by a loop over clients."""
    m, n = trained[0].adapter[module].shape
    b, a, c = torch.zeros(m, dtype=torch.float64), torch.zeros(n, dtype=torch.float64), 0.0
    for p, client in zip(federation.p, trained, strict=True):
        pair = client.adapter[module]
        if pair.rank > j:
            b, a, c = b + p * pair.scale * pair.B[:, j], a + p * pair.A[j], c + p
    return b, a, c


@given(federation=federations())
def test_zero_padding_sums_over_contributors(federation: Federation) -> None:
    method = make_method("zero-padding")
    state = start(method, federation)
    trained = train(method, state, federation)
    after, patch = method.aggregate(state, trained)
    assert not patch
    for module, pair in after.adapter.items():
        for j in range(federation.largest):
            b, a, c = mean_over(federation, trained, module, j)
            before = state.adapter[module]
            assert torch.allclose(pair.B[:, j], b if c else before.B[:, j], atol=1e-10)
            assert torch.allclose(pair.A[j], a if c else before.A[j], atol=1e-10)


@given(federation=federations())
def test_replication_fills_missing_rows_with_the_mean_of_those_that_have_them(federation: Federation) -> None:
    """Padding first and averaging all clients after, as the paper says it; ours averages the contributors."""
    method = make_method("replication")
    state = start(method, federation)
    trained = train(method, state, federation)
    after, _ = method.aggregate(state, trained)
    for module, pair in after.adapter.items():
        for j in range(federation.largest):
            b, a, c = mean_over(federation, trained, module, j)
            if not c:
                assert torch.equal(pair.B[:, j], state.adapter[module].B[:, j])
                continue
            # every absent client is given the contributors' mean, then all are averaged
            padded_b, padded_a = b + (1 - c) * b / c, a + (1 - c) * a / c
            assert torch.allclose(pair.B[:, j], padded_b, atol=1e-9)
            assert torch.allclose(pair.A[j], padded_a, atol=1e-9)


@given(federation=federations())
def test_ffa_moves_b_by_the_weighted_changes_and_never_a(federation: Federation) -> None:
    method = make_method("ffa")
    state = start(method, federation)
    trained = train(method, state, federation)
    after, _ = method.aggregate(state, trained)
    for module, pair in after.adapter.items():
        before = state.adapter[module]
        assert torch.equal(pair.A, before.A)
        for j in range(federation.largest):
            expected = before.B[:, j].clone()
            for p, client in zip(federation.p, trained, strict=True):
                mine = client.adapter[module]
                if mine.rank > j:
                    expected += p * (mine.scale * mine.B[:, j] - before.B[:, j])
            assert torch.allclose(pair.B[:, j], expected, atol=1e-9)


@given(federation=federations())
def test_fedex_gives_the_mean_of_products_after_replication(federation: Federation) -> None:
    method = make_method("fedex")
    state = start(method, federation)
    trained = train(method, state, federation)
    expected = {}
    for module, pair in state.adapter.items():
        total = torch.zeros(pair.shape, dtype=torch.float64)
        for j in range(federation.largest):
            b, a, c = mean_over(federation, trained, module, j)
            b_mean, a_mean = (b / c, a / c) if c else (pair.B[:, j], pair.A[j])
            for p, client in zip(federation.p, trained, strict=True):
                mine = client.adapter[module]
                held = mine.rank > j
                b_i, a_i = (mine.scale * mine.B[:, j], mine.A[j]) if held else (b_mean, a_mean)
                total += p * torch.outer(b_i, a_i)
        expected[module] = total
    after, patch = method.aggregate(state, trained)
    assert_same(global_weight(after, patch), expected)
    for product in patch.values():
        assert product.width == sum(federation.ranks) - max(federation.ranks)


def test_fedex_residual_is_zero_when_all_clients_share_A() -> None:
    federation = Federation([3, 3, 3], [2.0, 2.0, 2.0], [1.0, 2.0, 3.0], 3, 1)
    method = make_method("fedex")
    state = start(method, federation)
    shared = [
        c.adapter.map(lambda pair: LoraPair(torch.ones_like(pair.A), pair.B, pair.scale))
        for c in train(method, state, federation)
    ]
    _, patch = method.aggregate(state, contributions(federation, shared))
    assert patch == {}


def test_fedex_residual_is_not_transposed() -> None:
    """The published reference adds the transposed residual to a Linear, which a square layer does not notice."""
    federation = Federation([2, 2], [1.0, 1.0], [1.0, 1.0], 2, 4)
    method = make_method("fedex")
    state = start(method, federation)
    trained = train(method, state, federation)
    after, patch = method.aggregate(state, trained)
    exact = sum(0.5 * dense(c.adapter["square"]) for c in trained)
    right = dense(after.adapter["square"]) + dense(patch["square"])
    wrong = dense(after.adapter["square"]) + dense(patch["square"]).T
    assert torch.allclose(right, exact, atol=1e-10)
    assert (wrong - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("spread", [0.1, 1e-3, 1e-4])
def test_fp32_residual_keeps_its_digits_as_clients_come_to_agree(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    m, n, r, K = 96, 80, 8, 10
    B0, A0 = torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)
    pairs = [
        LoraPair(
            A0 + spread * torch.randn(r, n, generator=generator), B0 + spread * torch.randn(m, r, generator=generator)
        )
        for _ in range(K)
    ]
    exact = sum(pair.B.double() @ pair.A.double() for pair in pairs) / K
    B, A = sum(pair.B.double() for pair in pairs) / K, sum(pair.A.double() for pair in pairs) / K
    exact = exact - B @ A
    product = residual([(1 / K, pair) for pair in pairs], LoraPair(A, B))
    ours = dense(type(product)(product.U.float(), product.V.float()))
    published = sum(pair.B @ pair.A for pair in pairs) / K - A.float().T.matmul(B.float().T).T
    assert (ours - exact).norm() < 1e-6 * exact.norm()
    if spread <= 1e-3:
        assert (published - exact).norm() > 1e-2 * exact.norm()


def test_equal_ranks_give_identical_bytes_for_zero_padding_replication_and_fedit() -> None:
    federation = Federation([3, 3, 3], [8 / 3] * 3, [5.0, 7.0, 11.0], 3, 9)
    results = []
    for name in ("fedit", "zero-padding", "replication"):
        method = make_method(name)
        state = start(method, federation)
        single = [
            Contribution(c.client, c.weight, c.adapter.map(lambda p: LoraPair(p.A.float(), p.B.float(), p.scale)))
            for c in train(method, state, federation)
        ]
        state = type(state)(state.round, state.adapter.map(lambda p: LoraPair(p.A.float(), p.B.float())))
        after, _ = method.aggregate(state, single)
        results.append(b"".join(p.A.numpy().tobytes() + p.B.numpy().tobytes() for p in after.adapter.values()))
    assert results[0] == results[1] == results[2]


def test_methods_differ_at_mixed_ranks() -> None:
    federation = Federation([1, 2, 4], [1.0] * 3, [1.0] * 3, 4, 2)
    outcomes: dict[str, Adapter] = {}
    for name in ("zero-padding", "replication"):
        method = make_method(name)
        state = start(method, federation)
        outcomes[name] = method.aggregate(state, train(method, state, federation))[0].adapter
    assert not torch.allclose(outcomes["zero-padding"]["tall"].B, outcomes["replication"]["tall"].B)


def test_a_client_downloads_the_first_columns_and_rows() -> None:
    federation = Federation([2, 4], [0.5, 4.0], [1.0, 1.0], 4, 0)
    for name in methods():
        method = make_method(name)
        state = start(method, federation)
        low, _ = received(method, state, federation)
        pair = state.adapter["wide"]
        assert torch.allclose(dense(low["wide"]), pair.B[:, :2] @ pair.A[:2])


def test_an_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(FedeltaError, match="unknown method 'replcation'; did you mean 'replication'"):
        make_method("replcation")


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(FedeltaError, match="method fedit has no option 'tau'"):
        make_method("fedit", tau=0.9)
