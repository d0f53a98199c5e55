"""Every registered method holds the properties that it states, and no test here knows a method's name."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.adapter import LoraPair
from fedelta.errors import FedeltaError
from fedelta.methods import Method, make_method, methods
from fedelta.ranks import RankSettings
from fedelta.server import FederationSettings, Server
from federation import (
    Federation,
    assert_same,
    contributions,
    dense,
    federations,
    global_weight,
    received,
    start,
    train,
)

every_method = pytest.mark.parametrize("name", methods())


def stating(attribute: str) -> pytest.MarkDecorator:
    """Every (method, mixed?) for which the method says that the property holds."""
    cases = []
    for name, method in methods().items():
        holds = getattr(method, attribute)
        if holds != "never":
            cases.append((name, False))
        if holds == "always" and method.mixed_ranks:
            cases.append((name, True))
    return pytest.mark.parametrize(("name", "mixed"), cases)


def mixed_allowed(name: str) -> bool:
    return methods()[name].mixed_ranks


@stating("exact")
@given(data=st.data())
def test_new_weight_is_old_plus_weighted_changes(name: str, mixed: bool, data: st.DataObject) -> None:
    method, federation = make_method(name), data.draw(federations(mixed))
    state = start(method, federation)
    trained = train(method, state, federation)
    after, patch = method.aggregate(state, iter(trained))
    expected = {module: dense(pair) for module, pair in state.adapter.items()}
    for p, before, now in zip(federation.p, received(method, state, federation), trained, strict=True):
        for module in expected:
            expected[module] = expected[module] + p * (dense(now.adapter[module]) - dense(before[module]))
    assert_same(global_weight(after, patch), expected)


@stating("no_op_invariant")
@given(data=st.data())
def test_nothing_changes_in_thirty_rounds_if_nobody_trains(name: str, mixed: bool, data: st.DataObject) -> None:
    method, federation = make_method(name), data.draw(federations(mixed))
    state = start(method, federation)
    expected = global_weight(state, {})
    patches = {module: torch.zeros(pair.shape, dtype=torch.float64) for module, pair in state.adapter.items()}
    for _ in range(30):
        state, patch = method.aggregate(state, contributions(federation, received(method, state, federation)))
        for module, product in patch.items():
            patches[module] += dense(product)
    found = {module: matrix + patches[module] for module, matrix in global_weight(state, {}).items()}
    assert_same(found, expected)


@every_method
def test_methods_that_deny_the_no_op_property_at_mixed_ranks_do_collapse(name: str) -> None:
    method = methods()[name]
    if not method.mixed_ranks or method.no_op_invariant == "always":
        return
    federation = Federation([1, 1, 1, 4], [1.0] * 4, [1.0] * 4, 4, 3)
    state = start(make_method(name), federation)
    before = state.adapter
    for _ in range(5):
        state, _ = make_method(name).aggregate(
            state, contributions(federation, received(make_method(name), state, federation))
        )
    for module, pair in state.adapter.items():
        tail = pair.B[:, 1:] @ pair.A[1:]
        original = before[module].B[:, 1:] @ before[module].A[1:]
        assert tail.norm() < 1e-2 * original.norm(), "rank collapse is the published behaviour"


@stating("gauge_invariant")
@given(data=st.data())
def test_a_change_of_gauge_at_a_client_changes_nothing(name: str, mixed: bool, data: st.DataObject) -> None:
    method, federation = make_method(name), data.draw(federations(mixed))
    state = start(method, federation)
    trained = train(method, state, federation)
    generator = torch.Generator().manual_seed(federation.seed)

    def turn(pair: LoraPair) -> LoraPair:
        G = torch.eye(pair.rank, dtype=torch.float64) + 0.3 * torch.rand(
            pair.rank, pair.rank, generator=generator, dtype=torch.float64
        )
        return LoraPair(torch.linalg.solve(G, pair.A), pair.B @ G, pair.scale)

    turned = [replace(trained[0], adapter=trained[0].adapter.map(turn)), *trained[1:]]
    assert_same(global_weight(*method.aggregate(state, turned)), global_weight(*method.aggregate(state, trained)), 1e-8)


@every_method
@given(data=st.data())
def test_the_order_of_clients_does_not_matter(name: str, data: st.DataObject) -> None:
    method, federation = make_method(name), data.draw(federations(mixed_allowed(name)))
    state = start(method, federation)
    trained = train(method, state, federation)
    shuffled = data.draw(st.permutations(trained))
    assert_same(
        global_weight(*method.aggregate(state, shuffled)), global_weight(*method.aggregate(state, trained)), 1e-9
    )


@every_method
def test_the_same_order_gives_the_same_bits(name: str) -> None:
    method, federation = make_method(name), Federation([2, 2, 2], [1.0, 2.0, 0.7], [1.0, 2.0, 3.0], 2, 5)
    state = start(method, federation)
    trained = train(method, state, federation)
    (one, patch_one), (two, patch_two) = method.aggregate(state, trained), method.aggregate(state, iter(trained))
    for module in one.adapter:
        assert torch.equal(one.adapter[module].A, two.adapter[module].A)
        assert torch.equal(one.adapter[module].B, two.adapter[module].B)
    assert all(torch.equal(patch_one[m].U, patch_two[m].U) for m in patch_one)


@every_method
@given(data=st.data())
def test_one_clients_update_comes_back_unchanged(name: str, data: st.DataObject) -> None:
    method = make_method(name)
    federation = data.draw(federations(mixed_allowed(name), max_clients=1))
    state = start(method, federation)
    (only,) = train(method, state, federation)
    after, patch = method.aggregate(state, [only])
    assert not patch
    r = federation.ranks[0]
    for module, pair in only.adapter.items():
        assert torch.allclose(dense(after.adapter[module].truncate(r)), dense(pair), atol=1e-9)
        # What nobody in the round holds keeps its previous value.
        assert torch.equal(after.adapter[module].B[:, r:], state.adapter[module].B[:, r:])
        assert torch.equal(after.adapter[module].A[r:], state.adapter[module].A[r:])


@stating("reduces_to_fedit")
@given(data=st.data())
def test_equal_ranks_give_plain_means_of_the_factors(name: str, mixed: bool, data: st.DataObject) -> None:
    method, federation = make_method(name), data.draw(federations(mixed=False))
    assert not mixed or methods()[name].mixed_ranks
    state = start(method, federation)
    trained = train(method, state, federation)
    after, patch = method.aggregate(state, trained)
    assert not patch
    for module, pair in after.adapter.items():
        B = sum(p * c.adapter[module].scale * c.adapter[module].B for p, c in zip(federation.p, trained, strict=True))
        A = sum(p * c.adapter[module].A for p, c in zip(federation.p, trained, strict=True))
        assert torch.allclose(pair.B, B, atol=1e-9)
        assert torch.allclose(pair.A, A, atol=1e-9)


@pytest.mark.parametrize("name", [n for n, m in methods().items() if m.linear])
@given(data=st.data())
def test_a_linear_methods_factors_are_weighted_sums_of_what_clients_send(name: str, data: st.DataObject) -> None:
    method, federation = make_method(name), data.draw(federations(mixed_allowed(name)))
    state = start(method, federation)
    first = train(method, state, federation)
    second = train(method, state, replace(federation, seed=federation.seed + 7))
    zero = contributions(federation, received(method, state, federation))
    both = [
        replace(
            a,
            adapter=type(a.adapter)(
                {
                    m: LoraPair(
                        a.adapter[m].A + b.adapter[m].A - z.adapter[m].A,
                        a.adapter[m].B + b.adapter[m].B - z.adapter[m].B,
                        a.adapter[m].scale,
                    )
                    for m in a.adapter
                }
            ),
        )
        for a, b, z in zip(first, second, zero, strict=True)
    ]
    results = [method.aggregate(state, c) for c in (both, first, second, zero)]
    assert not any(patch for _, patch in results)
    (sum_, _), (one, _), (two, _), (none, _) = results
    for module in sum_.adapter:
        for factor in ("A", "B"):
            s, a, b, z = (getattr(r.adapter[module], factor) for r in (sum_, one, two, none))
            assert torch.allclose(s, a + b - z, atol=1e-8)


@every_method
def test_a_method_for_equal_ranks_refuses_mixed_ones(name: str) -> None:
    method: Method = make_method(name)
    mixed = RankSettings(allocation="fixed", low=2, high=4)

    def serve() -> Server:
        return Server(method, FederationSettings(), mixed, alpha=8, rule="alpha/r", seed=0)

    if method.mixed_ranks:
        assert serve().method is method
    else:
        with pytest.raises(FedeltaError, match="needs equal ranks"):
            serve()
