"""Every registered method has the properties that it states. No test in this file names a method."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.errors import FedeltaError
from fedelta.federation.ranks import RankSettings
from fedelta.federation.server import Server
from fedelta.federation.settings import FederationSettings
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.methods import Method, make_method, methods
from federations import (
    SHAPES,
    VARIANTS,
    Federation,
    assert_same,
    dense,
    federations,
    global_weight,
    label,
    method_of,
    start,
    state_of,
    train,
    updates,
)

every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=label)
every_method = pytest.mark.parametrize("name", methods())


def stating(attribute: str) -> pytest.MarkDecorator:
    """Parametrize over (method, options, mixed ranks) for which the method states that the property holds."""
    cases = []
    for name, options in VARIANTS:
        method = method_of(name, options)
        holds = getattr(method.holds(), attribute)
        if holds != "never":
            cases.append((name, options, False))
        if holds == "always" and method.mixed_ranks:
            cases.append((name, options, True))
    return pytest.mark.parametrize(("name", "options", "mixed"), cases, ids=label)


def mixed_allowed(name: str) -> bool:
    return methods()[name].mixed_ranks


@stating("exact")
@given(data=st.data())
def test_new_weight_is_old_plus_weighted_changes(name: str, options: dict, mixed: bool, data: st.DataObject) -> None:
    method, federation = method_of(name, options), data.draw(federations(mixed))
    state = start(method, federation)
    clients = train(method, state, federation)
    after, patch = method.step(state, iter(updates(clients)))
    expected = {module: dense(pair) for module, pair in state.adapter.items()}
    for p, client in zip(federation.p, clients, strict=True):
        for module in expected:
            expected[module] = expected[module] + p * (dense(client.trained[module]) - dense(client.start[module]))
    assert_same(global_weight(after, patch), expected)


@stating("no_op_invariant")
@given(data=st.data())
def test_nothing_changes_in_thirty_rounds_if_no_client_trains(
    name: str, options: dict, mixed: bool, data: st.DataObject
) -> None:
    """Neither the global model nor a client's weight changes: its base, its tail for the round, and its product."""
    method, federation = method_of(name, options), data.draw(federations(mixed))
    state = start(method, federation)
    kept: dict[str, Adapter] = {}
    train(method, state, federation, kept)  # gives clients factors to keep
    before = global_weight(state, {})
    first = train(method, state, federation, kept, size=0)
    patches = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in SHAPES.items()}
    for _ in range(30):
        state, patch = method.step(state, updates(train(method, state, federation, kept, size=0)))
        for module, product in patch.items():
            patches[module] += dense(product)
    assert_same({m: matrix + patches[m] for m, matrix in global_weight(state, {}).items()}, before, 1e-8)
    for old, new in zip(first, train(method, state, federation, kept, size=0), strict=True):
        assert_same({m: new.weight(m) + patches[m] for m in SHAPES}, {m: old.weight(m) for m in SHAPES}, 1e-8)


@every_variant
def test_methods_that_deny_the_no_op_property_at_mixed_ranks_do_collapse(name: str, options: dict) -> None:
    method = method_of(name, options)
    if not method.mixed_ranks or method.holds().no_op_invariant == "always":
        return
    federation = Federation([1, 1, 1, 4], [1.0] * 4, [1.0] * 4, 4, 3)
    state = start(method, federation)
    before = state.adapter
    for _ in range(5):
        state, _ = method.step(state, updates(train(method, state, federation, size=0)))
    for module, pair in state.adapter.items():
        tail = pair.B[:, 1:] @ pair.A[1:]
        original = before[module].B[:, 1:] @ before[module].A[1:]
        assert tail.norm() < 1e-2 * original.norm(), "rank collapse is the published behavior"


@stating("gauge_invariant")
@given(data=st.data())
def test_a_change_of_gauge_at_a_client_changes_nothing(
    name: str, options: dict, mixed: bool, data: st.DataObject
) -> None:
    method, federation = method_of(name, options), data.draw(federations(mixed))
    state = start(method, federation)
    trained = updates(train(method, state, federation))
    generator = torch.Generator().manual_seed(federation.seed)

    def change_gauge(pair: LoraPair) -> LoraPair:
        G = torch.eye(pair.rank, dtype=torch.float64) + 0.3 * torch.rand(
            pair.rank, pair.rank, generator=generator, dtype=torch.float64
        )
        return LoraPair(torch.linalg.solve(G, pair.A), pair.B @ G, pair.scale)

    changed = [replace(trained[0], adapter=trained[0].adapter.map(change_gauge)), *trained[1:]]
    assert_same(global_weight(*method.step(state, changed)), global_weight(*method.step(state, trained)), 1e-8)


@every_variant
@given(data=st.data())
def test_the_order_of_clients_does_not_matter(name: str, options: dict, data: st.DataObject) -> None:
    method, federation = method_of(name, options), data.draw(federations(mixed_allowed(name)))
    state = start(method, federation)
    trained = updates(train(method, state, federation))
    (one, patch_one), (two, patch_two) = (
        method.step(state, trained),
        method.step(state, data.draw(st.permutations(trained))),
    )
    assert_same(global_weight(two, patch_two), global_weight(one, patch_one), 1e-8)
    # The global product does not cover A if clients share A alone, so A is compared as well.
    if method.keeps_basis:
        assert_same({m: p.A for m, p in two.adapter.items()}, {m: p.A for m, p in one.adapter.items()}, 1e-8)


@every_variant
def test_the_same_order_gives_the_same_bits(name: str, options: dict) -> None:
    method, federation = method_of(name, options), Federation([2, 2, 2], [1.0, 2.0, 0.7], [1.0, 2.0, 3.0], 2, 5)
    state = start(method, federation)
    trained = updates(train(method, state, federation))
    (one, patch_one), (two, patch_two) = method.step(state, trained), method.step(state, iter(trained))
    for module in one.adapter:
        assert torch.equal(one.adapter[module].A, two.adapter[module].A)
        assert torch.equal(one.adapter[module].B, two.adapter[module].B)
    assert all(
        torch.equal(tensor, patch_two[m].tensors[part])
        for m in patch_one
        for part, tensor in patch_one[m].tensors.items()
    )


@stating("identity")
@given(data=st.data())
def test_one_clients_update_comes_back_unchanged(name: str, options: dict, mixed: bool, data: st.DataObject) -> None:
    method = method_of(name, options)
    federation = data.draw(federations(mixed, max_clients=1))
    state = start(method, federation)
    kept: dict[str, Adapter] = {}
    (only,) = train(method, state, federation, kept)
    after, patch = method.step(state, updates([only]))
    # The client may have pruned its adapter. The server then sends it the new rank.
    (again,) = train(method, after, replace(federation, ranks=[only.trained.rank]), kept, size=0)
    base = {m: dense(patch[m]) if m in patch else 0 for m in SHAPES}
    assert_same({m: base[m] + again.weight(m) for m in SHAPES}, {m: only.weight(m) for m in SHAPES})


@every_variant
def test_a_method_that_denies_the_identity_changes_a_single_clients_update(name: str, options: dict) -> None:
    method = method_of(name, options)
    if method.holds().identity != "never":
        return
    alone = Federation([4], [1.0], [1.0], 4, 3)
    state = start(method, alone)
    (only,) = train(method, state, alone)
    after, patch = method.step(state, updates([only]))
    weight = global_weight(after, patch)
    assert any((weight[m] - only.weight(m)).norm() > 1e-3 * only.weight(m).norm() for m in SHAPES)


@stating("reduces_to_fedit")
@given(data=st.data())
def test_equal_ranks_give_plain_means_of_the_factors(
    name: str, options: dict, mixed: bool, data: st.DataObject
) -> None:
    method, federation = method_of(name, options), data.draw(federations(mixed=False))
    assert not mixed or methods()[name].mixed_ranks
    state = start(method, federation)
    trained = updates(train(method, state, federation))
    after, patch = method.step(state, trained)
    assert not patch
    for module, pair in after.adapter.items():
        B = sum(p * c.adapter[module].scale * c.adapter[module].B for p, c in zip(federation.p, trained, strict=True))
        A = sum(p * c.adapter[module].A for p, c in zip(federation.p, trained, strict=True))
        assert torch.allclose(pair.B, B, atol=1e-9)
        assert torch.allclose(pair.A, A, atol=1e-9)


@pytest.mark.parametrize(("name", "options"), [v for v in VARIANTS if method_of(*v).holds().linear], ids=label)
@given(data=st.data())
def test_a_linear_methods_factors_are_weighted_sums_of_the_clients_factors(
    name: str, options: dict, data: st.DataObject
) -> None:
    method, federation = method_of(name, options), data.draw(federations(mixed_allowed(name)))
    state = start(method, federation)
    first = updates(train(method, state, federation))
    second = updates(train(method, state, replace(federation, seed=federation.seed + 7)))
    zero = updates(train(method, state, federation, size=0))

    def combine(a: Adapter, b: Adapter, z: Adapter) -> Adapter:
        return Adapter({m: LoraPair(a[m].A + b[m].A - z[m].A, a[m].B + b[m].B - z[m].B, a[m].scale) for m in a})

    both = [
        replace(a, adapter=combine(a.adapter, b.adapter, z.adapter))
        for a, b, z in zip(first, second, zero, strict=True)
    ]
    results = [method.step(state, c) for c in (both, first, second, zero)]
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


@every_variant
def test_options_survive_the_message_that_tells_clients(name: str, options: dict) -> None:
    step = {} if "residual_step" in dict(methods()[name].refused) else {"residual_step": 0.5}
    method = method_of(name, {**options, "server_learning_rate": 0.5, **step})
    assert make_method(method.name, **method.options) == method


@every_variant
def test_a_refresh_moves_the_product_into_the_base_and_changes_nothing_else(name: str, options: dict) -> None:
    federation = Federation([3, 3, 3], [1.0, 2.0, 0.5], [1.0, 2.0, 3.0], 3, 8)
    plain = method_of(name, options)
    if "refresh" in dict(plain.refused):
        with pytest.raises(FedeltaError, match="can't have refresh"):
            method_of(name, {**options, "refresh": 4})
        return
    refreshing = method_of(name, {**options, "refresh": 4})
    state = state_of(plain, 3, rounds=3)
    trained = updates(train(plain, state, federation))
    one, two = plain.step(state, trained), refreshing.step(state, trained)
    assert_same(global_weight(*two), global_weight(*one))
    assert not any(pair.B.any() for pair in two[0].adapter.values())
    assert all(not torch.equal(pair.A, state.adapter[m].A) for m, pair in two[0].adapter.items())
    assert two[0].round == 4
