"""What a method's step loses of the mean product, against dense matrices."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import Tensor

from fedelta.methods import Method, MethodState, make_method, methods
from fedelta.methods.exactness import lost_in_step
from federations import VARIANTS, Client, Federation, dense, federations, global_weight, label, start, train, updates

ZEROS = {"zero-padding", "hetlora", "flexlora", "fedmomentum", "flora", "florist"}
UNCHANGED = {"ffa", "rolora", "fedsvd"}
NO_MEAN = {"fedsa", "fedex-keep"}


def shares(method: Method, federation: Federation, clients: list[Client]) -> list[float]:
    """p_i, by the norm of the whole adapter if the method weights by norm."""
    if not method.norm_weighting:
        return federation.p
    norms = [sum(float(dense(p).norm()) ** 2 for p in c.contribution.adapter.values()) ** 0.5 for c in clients]
    return [norm / sum(norms) for norm in norms]


def padded_mean(
    state: MethodState, p: list[float], clients: list[Client], module: str, normalized: bool
) -> tuple[Tensor, Tensor]:
    """Mean of the products of factors that are padded with the contributors' means, and the mean by contributors."""
    before = state.adapter[module]
    B_mean, A_mean = before.B.clone(), before.A.clone()
    by_index = torch.zeros(before.shape, dtype=torch.float64)
    held = [
        list(range(c.contribution.adapter[module].rank))
        if c.contribution.indices is None
        else c.contribution.indices.tolist()
        for c in clients
    ]
    for j in range(before.rank):
        mine = [(share, c, own.index(j)) for share, c, own in zip(p, clients, held, strict=True) if j in own]
        mass = sum(share for share, _, _ in mine)
        if mass == 0:
            by_index += torch.outer(before.B[:, j], before.A[j])
            continue
        pairs = [(share / mass, c.contribution.adapter[module], k) for share, c, k in mine]
        B_mean[:, j] = sum(w * pair.scale * pair.B[:, k] for w, pair, k in pairs)
        A_mean[j] = sum(w * pair.A[k] for w, pair, k in pairs)
        by_index += sum(w * pair.scale * torch.outer(pair.B[:, k], pair.A[k]) for w, pair, k in pairs)
    if normalized:
        return by_index
    total = torch.zeros(before.shape, dtype=torch.float64)
    for share, c, own in zip(p, clients, held, strict=True):
        B, A, pair = B_mean.clone(), A_mean.clone(), c.contribution.adapter[module]
        B[:, own], A[own] = pair.scale * pair.B, pair.A
        total += share * B @ A
    return total


def dense_mean(method: Method, state: MethodState, p: list[float], clients: list[Client], module: str) -> Tensor:
    target = getattr(method, "target", "")
    if method.name in ZEROS:
        return sum(w * dense(c.contribution.adapter[module]) for w, c in zip(p, clients, strict=True))
    if method.name in UNCHANGED or target == "start-relative":
        changes = [dense(c.contribution.adapter[module]) - dense(c.start[module]) for c in clients]
        return dense(state.adapter[module]) + sum(w * change for w, change in zip(p, changes, strict=True))
    return padded_mean(state, p, clients, module, method.name == "raflora" or target == "rank-normalized")


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=label)
@given(federation=federations())
def test_lost_is_the_relative_distance_of_the_new_global_weight_from_the_mean_of_products(
    name: str, options: dict, federation: Federation
) -> None:
    method = make_method(name, **options)
    if not method.mixed_ranks:
        rank = federation.ranks[0]
        federation = replace(federation, ranks=[rank] * len(federation.ranks), largest=rank)
    state = start(method, federation)
    clients = train(method, state, federation)
    moments = method.fold(state, updates(clients), measured=True, ranks=frozenset(federation.ranks))
    after, patch = method.conclude(state, moments)
    if name in NO_MEAN and name != "fedsa":
        assert lost_in_step(method, state, moments, after, patch) == {}
    if name in NO_MEAN:
        return
    lost = lost_in_step(method, state, moments, after, patch)
    reached, p = global_weight(after, patch), shares(method, federation, clients)
    for module, share in lost.items():
        mean = dense_mean(method, state, p, clients, module)
        expected = float((mean - reached[module]).norm() / mean.norm()) if mean.norm() > 0 else 0.0
        assert share == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_a_residual_leaves_nothing_lost_and_averages_apart_do() -> None:
    federation = Federation([2, 2, 4], [1.0, 2.0, 0.5], [1.0, 2.0, 3.0], 4, 0)
    lost = {}
    for name in ("zero-padding", "replication", "fedex", "flora"):
        method = make_method(name)
        state = start(method, federation)
        moments = method.fold(state, updates(train(method, state, federation)), measured=True)
        lost[name] = max(lost_in_step(method, state, moments, *method.conclude(state, moments)).values())
    assert lost["zero-padding"] > 0.1
    assert lost["replication"] > 0.01
    assert max(lost["fedex"], lost["flora"]) < 1e-7


def test_a_step_that_an_optimizer_moves_on_from_the_mean_is_not_measured() -> None:
    federation = Federation([2, 2], [1.0, 1.0], [1.0, 1.0], 2, 0)
    method = make_method("fedit", server_optimizer="fedavgm")
    state = start(method, federation)
    moments = method.fold(state, updates(train(method, state, federation)), measured=True)
    assert lost_in_step(method, state, moments, *method.conclude(state, moments)) == {}


def test_every_method_has_a_kind_of_mean_in_these_tests() -> None:
    assert set(methods()) >= ZEROS | UNCHANGED | NO_MEAN
