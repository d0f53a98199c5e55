"""Clients that join or leave a run between two rounds: what they are sent, and what the rounds become."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedelta.errors import FedeltaError
from fedelta.federation.membership import change_clients, why_not_join
from fedelta.federation.reply import ClientReply
from fedelta.federation.server import Server, ServerState
from fedelta.methods import methods
from fedelta.protocol.messages import ClientUpdate
from tiny_server import CLIENTS, make, reply

MIXED = {"allocation": "fixed", "per_client": (2, 4, 3, 4)}


def play(server: Server, state: ServerState, rounds: int) -> ServerState:
    for _ in range(rounds):
        clients = sorted(state.ranks)
        sent = {client: server.broadcast(state, client) for client in clients}
        updates = [answer(server, state, client) for client in clients]
        state, _ = server.step(state, [ClientReply(sent[update.client], update) for update in updates])
    return state


def answer(server: Server, state: ServerState, client: str) -> ClientUpdate:
    """Write the update of a client with the factors that its method sends back."""
    value = 0.1 * (ord(client[0]) - 96)
    update, sent = reply(server, state, client, 10, value), server.broadcast(state, client)
    core = {module: tensor + value for module, tensor in sent.factors.get("core", {}).items()}
    factors = {name: tensors for name, tensors in {**update.factors, "core": core}.items() if name in sent.plan.up}
    return replace(update, factors=factors)


def test_a_new_client_is_sent_all_base_patches_and_then_only_new_ones() -> None:
    server, state = make("fedex", MIXED)
    state = play(server, state, 3)
    assert state.log.version > 0
    state = change_clients(server, state, {"aa": 3}, [])
    assert list(state.ranks) == ["a", "aa", "b", "c", "d"]
    sent = server.broadcast(state, "aa")
    assert sent.rank == 3
    assert (sent.patch.start, sent.patch.end) == (0, state.log.version)
    after = play(server, state, 1)
    assert after.versions["aa"] == after.versions["a"]
    assert server.broadcast(after, "aa").patch.start == state.log.version


@pytest.mark.parametrize("name", methods())
def test_the_rounds_of_every_method_go_on_with_other_clients(name: str) -> None:
    server, state = make(name)
    if server.method.personal:
        pytest.skip("its clients keep factors, so it does not run with sites")
    state = play(server, state, 2)
    assert why_not_join(server, state, 2) is None
    results = []
    for _ in range(2):
        changed = change_clients(server, state, {"e": 2}, ["b"])
        assert set(changed.ranks) == set(changed.versions) == {"a", "c", "d", "e"}
        changed = play(server, changed, 2)
        back = play(server, change_clients(server, changed, {"b": 2}, []), 1)
        results.append(back)
    for module, pair in results[0].method.adapter.items():
        assert bool(pair.A.isfinite().all())
        assert torch.equal(pair.A, results[1].method.adapter[module].A)


@pytest.mark.parametrize(
    ("method", "ranks", "settings", "rank", "reason"),
    [
        ("fedex", MIXED, {}, 8, "the run's adapter has rank 4; it can join with --rank 4"),
        ("replication", {"high": 2}, {"weighting": (1.0, 1.0, 2.0, 1.0)}, 2, "lists the weights of the clients"),
        ("fedit", {"high": 2}, {}, 1, "needs equal ranks, and its rank is 1 instead of 2"),
    ],
)
def test_a_client_that_does_not_fit_is_told_why(
    method: str, ranks: dict[str, Any], settings: dict[str, Any], rank: int, reason: str
) -> None:
    server, state = make(method, ranks, **settings)
    assert reason in (why_not_join(server, state, rank) or "")


def test_a_client_that_leaves_keeps_its_place_in_a_list_of_weights() -> None:
    server, state = make(weighting=(1.0, 1.0, 2.0, 1.0))
    assert change_clients(server, state, {}, ["c"]).ranks.keys() == set(CLIENTS)


def test_too_few_remaining_clients_are_an_error() -> None:
    server, state = make(min_clients=3)
    assert len(change_clients(server, state, {}, ["a"]).ranks) == 3
    with pytest.raises(FedeltaError, match="round 0: 2 clients left, and federation.min_clients is 3"):
        change_clients(server, state, {}, ["a", "b"])
