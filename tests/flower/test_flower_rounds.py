"""The Flower engine in one round: which clients it asks and waits for, and how it handles their replies."""

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("flwr.serverapp")

from flwr.app import ConfigRecord, RecordDict

from fedelta.errors import BadUpdate, ClientFailed, FedeltaError, TooFewUpdates
from fedelta.federation.engines.rounds import Draw
from fedelta.federation.reply import ClientReply
from fedelta.flower.server import engine as engine_module
from fedelta.flower.server import farewell as farewell_module
from fedelta.flower.server import node_registry as registry_module
from fedelta.flower.server.engine import FlowerEngine
from fedelta.flower.server.farewell import dismiss
from fedelta.flower.server.grid_client import GridClient as RealGridClient
from fedelta.flower.server.grid_client import Incoming, Outgoing
from fedelta.flower.server.node_registry import NodeKey, NodeRegistry
from fedelta.flower.server.round_exchange import MAX_RESENDS, RoundKey
from fedelta.flower.server.server_app import dominant_site
from fedelta.learning.training.stopwatch import Stopwatch
from fedelta.protocol.farewell import Farewell
from fedelta.protocol.messages import Broadcast, ClientUpdate
from fedelta.protocol.serialization import pack, unpack
from tiny_server import CLIENTS, make, reply

NODES = {client: number for number, client in enumerate(CLIENTS, 1)}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (registry_module, engine_module):
        monkeypatch.setattr(module, "POLL_S", 0.0)
    monkeypatch.setattr(registry_module, "REFRESH_S", 0.0)


class GridClient:
    """Replaces `GridClient` and Flower's grid, with scripted replies.

    Args:
        respond: returns the reply to a message, or None for silence.
        nodes: numbers of the nodes that are online.
        slow: a client whose replies are put into `held` instead of `waiting`.
    """

    def __init__(self, respond: Callable[[Outgoing], Incoming | None], nodes: Iterable[int], slow: str = "") -> None:
        self.respond = respond
        self.nodes = list(nodes)
        self.slow = slow
        self.waiting: list[Incoming] = []
        self.held: list[Incoming] = []
        self.sent: list[Outgoing] = []
        self.grid = self

    def get_node_ids(self) -> list[int]:
        return self.nodes

    def send(self, messages: Iterable[Outgoing]) -> None:
        for message in messages:
            self.sent.append(message)
            if (incoming := self.respond(message)) is not None:
                slow = getattr(message.key, "client", None) == self.slow
                (self.held if slow else self.waiting).append(incoming)

    def receive(self) -> Iterator[Incoming]:
        while self.waiting:
            yield self.waiting.pop(0)


def introduction(message: Outgoing) -> Incoming:
    names = {number: client for client, number in NODES.items()}
    return Incoming(message.key, {"clients": [names[message.node]], "base": "w", "version": 0}, b"")


class World:
    """A server, its state, and clients with scripted behavior."""

    def __init__(self, method: str = "fedex", **settings: Any) -> None:
        self.server, self.state = make(method, **{"deadline": 0.05, **settings})
        self.warnings: list[str] = []
        self.behave: dict[str, Callable[[Outgoing], Incoming | None]] = {}
        self.grid_client = GridClient(self.respond, NODES.values())
        self.nodes = NodeRegistry(self.grid_client, CLIENTS, None, {}, self.warnings.append)  # type: ignore[arg-type]
        self.engine = FlowerEngine.__new__(FlowerEngine)
        self.engine.server, self.engine.nodes = self.server, self.nodes
        self.engine.grid_client = self.grid_client  # type: ignore[assignment]
        self.engine._rows = {}
        self.engine._late, self.engine._bytes_late, self.engine._caught_up = {}, 0, {}

    def respond(self, message: Outgoing) -> Incoming | None:
        if isinstance(message.key, NodeKey):
            return introduction(message)
        if message.key.client in self.behave:
            return self.behave[message.key.client](message)
        return self.good(message)

    def good(self, message: Outgoing) -> Incoming:
        broadcast = Broadcast.from_bytes(message.blob)
        update = reply(self.server, self.state, broadcast.client, 10, float(NODES[broadcast.client]))
        return Incoming(message.key, {}, update.to_bytes())

    def round(self, attempt: int = 0, absent: Iterable[str] = ()) -> dict[str, ClientReply]:
        draw = Draw(CLIENTS, frozenset(absent), attempt)
        replies = list(self.engine.replies(self.state, draw, Stopwatch(), Stopwatch()))
        assert [each.client for each in replies] == CLIENTS
        return {each.client: each for each in replies}


def reason(client_reply: ClientReply) -> str:
    assert isinstance(client_reply.update, ClientFailed)
    return client_reply.update.reason


def test_replies_are_yielded_in_the_order_of_the_draw_with_their_byte_counts() -> None:
    world = World()
    replies = world.round()
    assert all(isinstance(each.update, ClientUpdate) for each in replies.values())
    assert all(each.up.total > 0 and each.down.total > 0 for each in replies.values())
    assert [message.node for message in world.grid_client.sent if not isinstance(message.key, NodeKey)] == list(
        NODES.values()
    )


def test_silence_failure_dropout_and_an_offline_node_have_different_reasons() -> None:
    world = World()
    world.behave["a"] = lambda message: None  # noqa: ARG005
    world.behave["b"] = lambda message: Incoming(message.key, {}, b"", "its node failed: out of memory")
    world.grid_client.nodes.remove(NODES["d"])
    replies = world.round(absent=["c"])
    assert reason(replies["a"]) == "TimeoutError: no reply within 0 s"
    assert reason(replies["b"]) == "its node failed: out of memory"
    assert reason(replies["c"]) == "TimeoutError: dropped out"
    assert reason(replies["d"]) == "its site is away"
    assert replies["a"].up.total == 0
    assert replies["c"].down.total > 0


def test_a_round_keeps_the_first_replies_and_counts_the_last_as_late() -> None:
    world = World(sample=4, keep=3)
    world.grid_client.slow = "b"
    replies = world.round()
    assert reason(replies["b"]) == "3 others came first"
    assert sum(isinstance(each.update, ClientUpdate) for each in replies.values()) == 3
    assert world.engine.events()["late"] == {}
    # The reply arrives in the next attempt, to which it does not belong.
    world.grid_client.waiting += world.grid_client.held
    world.grid_client.slow = ""
    world.round(attempt=1)
    # All four replied this time, so one of these replies is late as well.
    assert world.engine.events()["late"] == {"b": 0, "d": 0}
    assert world.engine.events()["late"] == {}


def test_simultaneous_replies_beyond_those_that_a_round_keeps_are_late() -> None:
    world = World(sample=4, keep=2)
    replies = world.round()
    assert [client for client, each in replies.items() if isinstance(each.update, ClientUpdate)] == ["a", "b"]
    assert world.engine.events()["late"] == {"c": 0, "d": 0}


def test_a_restarted_trainer_is_sent_all_patches_and_both_messages_are_counted() -> None:
    world = World()
    for _ in range(2):
        world.state, _ = world.server.step(world.state, world.round().values())
    assert (world.state.log.version, world.state.versions["a"]) == (2, 1)
    patch_starts = []

    def restarted(message: Outgoing) -> Incoming:
        patch_starts.append(Broadcast.from_bytes(message.blob).patch.start)
        return Incoming(message.key, {"behind": 0}, b"") if patch_starts[-1] > 0 else world.good(message)

    world.behave["a"] = restarted
    replies = world.round()
    assert patch_starts == [1, 0]
    assert isinstance(replies["a"].update, ClientUpdate)
    assert world.engine.events()["caught_up"] == {"a": 0}
    assert replies["a"].down.total > replies["b"].down.total + replies["b"].down.adapter


def test_an_impossible_version_counts_as_an_unreadable_update() -> None:
    world = World()
    for version in (-1, 5, "0", True):
        world.behave["a"] = lambda message, version=version: Incoming(message.key, {"behind": version}, b"")  # type: ignore[misc]
        assert isinstance(world.round()["a"].update, FedeltaError)


def test_a_round_waits_for_min_clients() -> None:
    world = World(min_clients=3)
    world.grid_client.nodes = [1, 2]
    with pytest.raises(TooFewUpdates, match=r"no node serves client c, d \(2 of 4 are there, expected 3\)") as error:
        world.round()
    assert error.value.skipped == {"c": "its site is away", "d": "its site is away"}


def make_registry(replies: Any, registered: dict[int, str] | None = None) -> tuple[NodeRegistry, list[str]]:
    warnings: list[str] = []
    grid_client = GridClient(lambda message: Incoming(message.key, *replies[message.node]), replies)
    return NodeRegistry(grid_client, ["a", "b"], registered, {"classes": ["x"]}, warnings.append), warnings  # type: ignore[arg-type]


def test_without_registered_keys_the_last_node_that_names_a_client_serves_it() -> None:
    replies = {
        1: ({"clients": ["a", "b", "unknown"]}, b""),
        2: ({"clients": ["a"]}, b""),
        3: ({"clients": 7}, b""),
        4: ({}, b"", "its node failed"),
    }
    registry, warnings = make_registry(replies)
    registry.wait(["a", "b"], 2, 1.0)
    assert (registry["a"], registry["b"]) == (2, 1)
    assert warnings == []


def test_with_registered_keys_the_clients_that_nodes_name_are_ignored() -> None:
    replies = {1: ({"clients": ["b"]}, b""), 2: ({"clients": ["a"]}, b""), 3: ({"clients": ["a"]}, b"")}
    registry, _ = make_registry(replies, {1: "a", 2: "b"})
    registry.wait(["a", "b"], 2, 1.0)
    assert (registry["a"], registry["b"]) == (1, 2)


def test_a_site_that_refuses_or_has_changed_is_reported_once() -> None:
    replies: dict[int, Any] = {
        1: ({"failure": "settings", "setting": "training.steps"}, b""),
        2: ({"rank": 4, "base": "w"}, b""),
    }
    registry, warnings = make_registry(replies, {1: "a", 2: "b"})
    registry._question = {"settings": {"training.steps": 2}}
    with pytest.raises(FedeltaError, match=r"no node serves client a \(1 of 2"):
        registry.wait(["a", "b"], 2, 0.05)
    assert warnings == ["a can't take part: its training.steps is not the server's; its own log says why"]
    assert registry.capabilities["b"].rank == 4
    registry.require_base("w")
    with pytest.raises(FedeltaError, match="client b: the weights of its base model"):
        registry.require_base("other")
    for changed, line in (
        ({"rank": 8, "base": "w"}, "its rank was 4 and is 8"),
        ({"rank": 4, "base": "v"}, "the weights of its base model are not the server's"),
    ):
        replies[2] = (changed, b"")
        registry.accept(Incoming(NodeKey(2), changed, b""))
        assert warnings.pop() == f"b can't take part: {line}"
    # A node that was offline serves no client until it has answered, and none if it no longer fits.
    registry.grid_client.grid.nodes = [1]  # type: ignore[attr-defined]
    registry.refresh()
    registry.grid_client.grid.nodes = [1, 2]  # type: ignore[attr-defined]
    registry.refresh()
    for received in registry.grid_client.receive():
        registry.accept(received)
    assert "b" not in registry
    replies[2] = ({"rank": 4, "base": "w"}, b"")
    registry.accept(Incoming(NodeKey(2), replies[2][0], b""))
    assert "b" in registry


def test_a_node_that_is_still_starting_is_asked_again() -> None:
    replies: dict[int, Any] = {1: ({"failure": "starting"}, b""), 2: ({"clients": ["b"]}, b"")}
    registry, _ = make_registry(replies)
    registry.refresh()
    registry.accept(next(iter(registry.grid_client.receive())))
    replies[1] = ({"clients": ["a"]}, b"")
    registry.wait(["a", "b"], 2, 1.0)
    assert registry["a"] == 1


def test_a_trainer_that_always_lacks_patches_is_given_up() -> None:
    world = World()
    for _ in range(2):
        world.state, _ = world.server.step(world.state, world.round().values())
    world.behave["a"] = lambda message: Incoming(message.key, {"behind": 0}, b"")
    before = len(world.grid_client.sent)
    assert isinstance(world.round()["a"].update, BadUpdate)
    assert len(world.grid_client.sent) - before == 4 + MAX_RESENDS


def test_an_invalid_update_does_not_use_up_a_place_in_the_round() -> None:
    world = World(sample=4, keep=3)

    def not_a_number(message: Outgoing) -> Incoming:
        update = ClientUpdate.from_bytes(world.good(message).blob, "a")
        bad = {name: {m: t * torch.nan for m, t in tensors.items()} for name, tensors in update.factors.items()}
        return Incoming(message.key, {}, replace(update, factors=bad).to_bytes())

    world.behave["a"] = not_a_number
    replies = world.round()
    assert isinstance(replies["a"].update, BadUpdate)
    assert sum(isinstance(each.update, ClientUpdate) for each in replies.values()) == 3


def test_a_rank_above_the_servers_maximum_is_refused() -> None:
    for rank in (17, 10**9, True, "4", None):
        warnings: list[str] = []
        grid_client = GridClient(
            lambda message, rank=rank: Incoming(message.key, {"rank": rank, "base": "w"}, b""), [1]
        )  # type: ignore[misc]
        registry = NodeRegistry(grid_client, ["a"], {1: "a"}, {}, warnings.append, max_rank=16)  # type: ignore[arg-type]
        registry.refresh()
        for received in grid_client.receive():
            registry.accept(received)
        assert "a" not in registry
        assert "the server takes at most 16" in warnings[0]


class Grid:
    """Replaces Flower's grid: message number → the reply to return, or the exception to raise."""

    def __init__(self, replies: dict[str, Any]) -> None:
        self.replies = replies

    def pull_messages(self, numbers: list[str]) -> list[Any]:
        pulled = []
        for number in numbers:
            reply = self.replies.pop(number, None)
            if isinstance(reply, Exception):
                raise reply
            pulled += [reply] if reply is not None else []
        return pulled


def message(replies_to: str, **facts: Any) -> Any:
    metadata = SimpleNamespace(reply_to_message_id=replies_to)
    content = RecordDict({"message": ConfigRecord(facts)} if facts else {})
    return SimpleNamespace(metadata=metadata, has_error=lambda: False, content=content)


def test_a_node_cannot_reply_for_another_or_block_the_replies_of_others() -> None:
    grid = Grid({"1": message("2", blob=b"forged"), "2": ValueError("not a message"), "3": message("3", blob=b"own")})
    grid_client = RealGridClient(grid, trusted=False)  # type: ignore[arg-type]
    grid_client._pending = {"1": "a", "2": "b", "3": "c", "4": "d"}
    by_key = {received.key: received for received in grid_client.receive()}
    assert set(by_key) == {"a", "b", "c"}
    assert by_key["a"].error == "its reply can't be read: it replies to another message"
    assert by_key["b"].error == "its reply can't be read: not a message"
    assert by_key["c"].blob == b"own"
    assert grid_client._pending == {"4": "d"}


def test_a_malformed_blob_is_a_bad_update_and_raises_nothing() -> None:
    good = World().good(
        Outgoing(RoundKey(0, 0, "a"), 1, "train", World().server.broadcast(World().state, "a").to_bytes())
    )
    _, facts = unpack(good.blob)
    odd = pack({"zzz/x": torch.ones(2)}, {**facts, "factors": ["zzz"], "changed": {}})
    deep = json.dumps({"__metadata__": {"fedelta": "[" * 100_000}}).encode()
    nested = b"[" * 200_000
    long = good.blob + bytes(2**21)
    for blob in (
        long,
        odd,
        struct.pack("<Q", len(deep)) + deep,
        struct.pack("<Q", len(nested)) + nested,
        b"",
        b"\0" * 8,
    ):
        world = World()
        world.behave["a"] = lambda message, blob=blob: Incoming(message.key, {}, blob)  # type: ignore[misc]
        assert isinstance(world.round()["a"].update, BadUpdate)


def test_every_site_is_told_the_end_once_it_can_listen_and_those_that_are_away_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(farewell_module, "AWAY_S", 0.1)
    monkeypatch.setattr(farewell_module, "POLL_S", 0.0)
    told: list[int] = []

    def respond(message: Outgoing) -> Incoming:
        told.append(message.node)
        if message.node == 2 and told.count(2) < 3:
            return Incoming(message.key, {"failure": "starting"}, b"")
        if message.node == 3 and told.count(3) < 2:
            return Incoming(message.key, {}, b"", "its node failed")
        if 4 not in grid_client.nodes and told.count(2) == 2:
            grid_client.nodes.append(4)  # a site comes back
        return Incoming(message.key, {}, b"")

    grid_client = GridClient(respond, [1, 2, 3])
    clients = {1: "a", 2: "b", 3: "c", 4: "d", 5: "e"}
    registry = NodeRegistry(grid_client, list(clients.values()), clients, {}, print)  # type: ignore[arg-type]
    assert dismiss(registry, Farewell(2), timeout=5.0) == ["e"]
    assert {node: told.count(node) for node in clients} == {1: 1, 2: 3, 3: 2, 4: 1, 5: 0}


def test_the_text_of_a_node_error_is_not_shown() -> None:
    error = SimpleNamespace(code=2, reason="\x1b[2Ja row of the site")
    failed = SimpleNamespace(
        metadata=SimpleNamespace(reply_to_message_id="1"), has_error=lambda: True, error=error, content=RecordDict({})
    )
    grid_client = RealGridClient(Grid({"1": failed}), trusted=False)  # type: ignore[arg-type]
    grid_client._pending = {"1": "a"}
    assert [each.error for each in grid_client.receive()] == ["its node failed: its program raised an error"]


def test_a_site_whose_rows_outweigh_all_others_is_named() -> None:
    line = dominant_site({"a": 10, "b": 10**12, "c": 20})
    assert line is not None
    assert line.startswith("b states 1000000000000 rows, 100.0% of all")
    assert len(line) < 250
    assert dominant_site({"a": 10, "b": 12, "c": 11}) is None
    assert dominant_site({"a": 10, "b": 60}) is None
    assert dominant_site({"a": 10}) is None
    assert dominant_site({}) is None


def test_a_site_of_a_deployment_states_its_rows_and_cannot_train_on_more() -> None:
    for rows in (0, -1, "9", None, True, 10**13):
        warnings: list[str] = []
        facts = {"rank": 4, "base": "w", "rows": rows}
        grid_client = GridClient(lambda message, facts=facts: Incoming(message.key, facts, b""), [1])  # type: ignore[misc]
        registry = NodeRegistry(grid_client, ["a"], {1: "a"}, {}, warnings.append, max_rank=16)  # type: ignore[arg-type]
        registry.refresh()
        for received in grid_client.receive():
            registry.accept(received)
        assert "a" not in registry
        assert "it does not state its number of rows" in warnings[0]
    world = World()
    world.engine._rows = {"a": 9, "b": 10}
    replies = world.round()
    assert isinstance(replies["a"].update, BadUpdate)
    assert "it reports 10 training examples, expected 1 to 9" in replies["a"].update.reason
    assert replies["b"].rows == 10


def test_an_outlier_does_not_use_up_a_place_in_the_round_and_is_skipped() -> None:
    world = World(sample=4, keep=3)

    def huge(message: Outgoing) -> Incoming:
        update = ClientUpdate.from_bytes(world.good(message).blob, "a")
        factors = {name: {m: t * 1e3 for m, t in tensors.items()} for name, tensors in update.factors.items()}
        return Incoming(message.key, {}, replace(update, factors=factors).to_bytes())

    world.behave["a"] = huge
    _, outcome = world.server.step(world.state, world.round().values())
    assert outcome.contributors == ["b", "c", "d"]
    assert "the norm of its adapter grew to" in outcome.skipped["a"]


def test_a_client_joins_once_its_node_has_answered_and_leaves_with_its_key() -> None:
    registered = {1: "a", 2: "b"}
    grid_client, messages = GridClient(lambda _: None, [1, 2, 9]), []
    registry = NodeRegistry(grid_client, ["a", "b"], registered, {}, print, 2, lambda: registered)  # type: ignore[arg-type]
    registry.refresh()
    # Node 9 is online before its name is known here, so it is not asked yet.
    assert [message.node for message in grid_client.sent] == [1, 2]
    registered = {1: "a", 2: "b", 9: "late"}
    registry.refresh()
    assert [json.loads(message.blob)["client"] for message in grid_client.sent] == ["a", "b", "late"]
    assert "late" not in registry
    registry.accept(Incoming(NodeKey(9), {"clients": ["b"], "base": "w", "rank": 2, "rows": 7}, b""))
    assert registry["late"] == 9
    world = World("fedex", deadline=0.05)
    engine, state = world.engine, world.state
    engine.nodes, engine.observer, engine._declined = registry, SimpleNamespace(say=messages.append), {}  # type: ignore[assignment]
    registered = {1: "a", 9: "late"}
    state = engine.update_clients(state)
    assert sorted(state.ranks) == ["a", "late"]
    assert messages[0] == "round 0: late joins with 7 rows at rank 2"
    assert engine.update_clients(state) is state


def test_a_round_does_not_wait_for_a_site_that_was_removed() -> None:
    world = World(deadline=60.0)
    world.behave["b"] = lambda _: None
    registered = {number: client for client, number in NODES.items()}

    def follow() -> dict[int, str]:
        # The site is removed after its message was sent.
        if any(isinstance(message.key, RoundKey) for message in world.grid_client.sent):
            registered.pop(NODES["b"], None)
        return registered

    world.nodes._registered, world.nodes._follow = registered, follow
    assert reason(world.round()["b"]) == "its site was removed"
