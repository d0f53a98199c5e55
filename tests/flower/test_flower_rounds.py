"""The engine's own part of a round over Flower: whom it asks, whom it waits for, and what it makes of what comes."""

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
from fedelta.flower.server import node_registry as nodes_module
from fedelta.flower.server.engine import FlowerEngine
from fedelta.flower.server.grid_client import GridClient as RealMail
from fedelta.flower.server.grid_client import Incoming, Outgoing
from fedelta.flower.server.node_registry import NodeKey, NodeRegistry
from fedelta.flower.server.round_exchange import MAX_RESENDS, RoundKey
from fedelta.learning.training.stopwatch import Stopwatch
from fedelta.protocol.messages import Broadcast, ClientUpdate
from fedelta.protocol.serialization import pack, unpack
from tiny_server import CLIENTS, make, reply

NODES = {client: number for number, client in enumerate(CLIENTS, 1)}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (nodes_module, engine_module):
        monkeypatch.setattr(module, "POLL_S", 0.0)
    monkeypatch.setattr(nodes_module, "LOOK_S", 0.0)


class GridClient:
    """As Flower's, with a script of what nodes answer.

    Args:
        answers: of a message, what comes back: a reply, or None for silence.
        order: keys of clients in the order in which they come; others as they were sent.
    """

    def __init__(self, answers: Callable[[Outgoing], Incoming | None], nodes: Iterable[int], slow: str = "") -> None:
        self.answers = answers
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
            if (answer := self.answers(message)) is not None:
                slow = getattr(message.key, "client", None) == self.slow
                (self.held if slow else self.waiting).append(answer)

    def receive(self) -> Iterator[Incoming]:
        while self.waiting:
            yield self.waiting.pop(0)


def who(message: Outgoing) -> Incoming:
    names = {number: client for client, number in NODES.items()}
    return Incoming(message.key, {"clients": [names[message.node]], "base": "w", "version": 0}, b"")


class World:
    """A server, its state, and clients that answer as they are told."""

    def __init__(self, method: str = "fedex", **settings: Any) -> None:
        self.server, self.state = make(method, **{"deadline": 0.05, **settings})
        self.warnings: list[str] = []
        self.behave: dict[str, Callable[[Outgoing], Incoming | None]] = {}
        self.grid_client = GridClient(self.answer, NODES.values())
        self.nodes = NodeRegistry(self.grid_client, CLIENTS, None, {}, self.warnings.append)  # type: ignore[arg-type]
        self.engine = FlowerEngine.__new__(FlowerEngine)
        self.engine.server, self.engine.nodes = self.server, self.nodes
        self.engine.grid_client = self.grid_client  # type: ignore[assignment]
        self.engine._late, self.engine._bytes_late, self.engine._caught_up = {}, 0, {}

    def answer(self, message: Outgoing) -> Incoming | None:
        if isinstance(message.key, NodeKey):
            return who(message)
        if message.key.client in self.behave:
            return self.behave[message.key.client](message)
        return self.good(message)

    def good(self, message: Outgoing) -> Incoming:
        broadcast = Broadcast.from_bytes(message.blob)
        update = reply(self.server, self.state, broadcast.client, 10, float(NODES[broadcast.client]))
        return Incoming(message.key, {}, update.to_bytes())

    def round(self, attempt: int = 0, absent: Iterable[str] = ()) -> dict[str, ClientReply]:
        draw = Draw(CLIENTS, frozenset(absent), attempt)
        answers = list(self.engine.replies(self.state, draw, Stopwatch(), Stopwatch()))
        assert [answer.client for answer in answers] == CLIENTS
        return {answer.client: answer for answer in answers}


def reason(answer: ClientReply) -> str:
    assert isinstance(answer.update, ClientFailed)
    return answer.update.reason


def test_all_who_answer_are_handed_on_in_order_with_their_bytes() -> None:
    world = World()
    found = world.round()
    assert all(isinstance(answer.update, ClientUpdate) for answer in found.values())
    assert all(answer.up.total > 0 and answer.down.total > 0 for answer in found.values())
    assert [message.node for message in world.grid_client.sent if not isinstance(message.key, NodeKey)] == list(
        NODES.values()
    )


def test_silence_failure_absence_and_a_node_that_is_away_are_told_apart() -> None:
    world = World()
    world.behave["a"] = lambda message: None  # noqa: ARG005
    world.behave["b"] = lambda message: Incoming(message.key, {}, b"", "its node failed: out of memory")
    world.grid_client.nodes.remove(NODES["d"])
    found = world.round(absent=["c"])
    assert reason(found["a"]) == "TimeoutError: no reply within 0 s"
    assert reason(found["b"]) == "its node failed: out of memory"
    assert reason(found["c"]) == "TimeoutError: dropped out"
    assert reason(found["d"]) == "its site is away"
    assert found["a"].up.total == 0
    assert found["c"].down.total > 0


def test_the_first_to_come_make_the_round_and_the_last_is_late() -> None:
    world = World(sample=4, keep=3)
    world.grid_client.slow = "b"
    found = world.round()
    assert reason(found["b"]) == "3 others came first"
    assert sum(isinstance(answer.update, ClientUpdate) for answer in found.values()) == 3
    assert world.engine.events()["late"] == {}
    # It comes in the next round, to which it does not belong.
    world.grid_client.waiting += world.grid_client.held
    world.grid_client.slow = ""
    world.round(attempt=1)
    # Four answered this time, so that one of them is late as well.
    assert world.engine.events()["late"] == {"b": 0, "d": 0}
    assert world.engine.events()["late"] == {}


def test_more_at_once_than_a_round_keeps_are_late_too() -> None:
    world = World(sample=4, keep=2)
    found = world.round()
    assert [client for client, answer in found.items() if isinstance(answer.update, ClientUpdate)] == ["a", "b"]
    assert world.engine.events()["late"] == {"c": 0, "d": 0}


def test_a_blank_trainer_gets_every_patch_and_both_messages_count() -> None:
    world = World()
    for _ in range(2):
        world.state, _ = world.server.step(world.state, world.round().values())
    assert (world.state.log.version, world.state.versions["a"]) == (2, 1)
    asked = []

    def blank(message: Outgoing) -> Incoming:
        asked.append(Broadcast.from_bytes(message.blob).patch.start)
        return Incoming(message.key, {"behind": 0}, b"") if asked[-1] > 0 else world.good(message)

    world.behave["a"] = blank
    found = world.round()
    assert asked == [1, 0]
    assert isinstance(found["a"].update, ClientUpdate)
    assert world.engine.events()["caught_up"] == {"a": 0}
    assert found["a"].down.total > found["b"].down.total + found["b"].down.adapter


def test_a_version_that_makes_no_sense_is_an_update_that_can_not_be_read() -> None:
    world = World()
    for version in (-1, 5, "0", True):
        world.behave["a"] = lambda message, version=version: Incoming(message.key, {"behind": version}, b"")  # type: ignore[misc]
        assert isinstance(world.round()["a"].update, FedeltaError)


def test_a_round_waits_for_its_quorum() -> None:
    world = World(min_clients=3)
    world.grid_client.nodes = [1, 2]
    with pytest.raises(TooFewUpdates, match=r"no node serves client c, d \(2 of 4 are there, expected 3\)") as found:
        world.round()
    assert found.value.skipped == {"c": "its site is away", "d": "its site is away"}


def nodes(answers: Any, names: dict[int, str] | None = None) -> tuple[NodeRegistry, list[str]]:
    warnings: list[str] = []
    grid_client = GridClient(lambda message: Incoming(message.key, *answers[message.node]), answers)
    return NodeRegistry(grid_client, ["a", "b"], names, {"classes": ["x"]}, warnings.append), warnings  # type: ignore[arg-type]


def test_where_nodes_are_believed_the_last_that_names_a_client_has_it() -> None:
    told = {
        1: ({"clients": ["a", "b", "stranger"]}, b""),
        2: ({"clients": ["a"]}, b""),
        3: ({"clients": 7}, b""),
        4: ({}, b"", "its node failed"),
    }
    found, warnings = nodes(told)
    found.wait(["a", "b"], 2, 1.0)
    assert (found["a"], found["b"]) == (2, 1)
    assert warnings == []


def test_where_nodes_are_registered_nobody_is_believed() -> None:
    told = {1: ({"clients": ["b"]}, b""), 2: ({"clients": ["a"]}, b""), 3: ({"clients": ["a"]}, b"")}
    found, _ = nodes(told, {1: "a", 2: "b"})
    found.wait(["a", "b"], 2, 1.0)
    assert (found["a"], found["b"]) == (1, 2)


def test_a_site_that_refuses_or_has_changed_is_named_once() -> None:
    told: dict[int, Any] = {1: ({"refused": "training.steps is 9 here"}, b""), 2: ({"rank": 4, "base": "w"}, b"")}
    found, warnings = nodes(told, {1: "a", 2: "b"})
    with pytest.raises(FedeltaError, match=r"no node serves client a \(1 of 2"):
        found.wait(["a", "b"], 2, 0.05)
    assert warnings == ["a can't take part: training.steps is 9 here"]
    assert found.capabilities["b"].rank == 4
    found.expect("w")
    with pytest.raises(FedeltaError, match="client b: the weights of its base model"):
        found.expect("other")
    for changed, line in (
        ({"rank": 8, "base": "w"}, "its rank was 4 and is 8"),
        ({"rank": 4, "base": "v"}, "the weights of its base model are not the server's"),
    ):
        told[2] = (changed, b"")
        found.hear(Incoming(NodeKey(2), changed, b""))
        assert warnings.pop() == f"b can't take part: {line}"
    # A node that was away serves nobody until it has answered, and not if it no longer fits.
    found.grid_client.grid.nodes = [1]  # type: ignore[attr-defined]
    found.look()
    found.grid_client.grid.nodes = [1, 2]  # type: ignore[attr-defined]
    found.look()
    for received in found.grid_client.receive():
        found.hear(received)
    assert "b" not in found
    told[2] = ({"rank": 4, "base": "w"}, b"")
    found.hear(Incoming(NodeKey(2), told[2][0], b""))
    assert "b" in found


def test_a_node_that_is_starting_is_asked_again() -> None:
    told: dict[int, Any] = {1: ({"failed": "not yet"}, b""), 2: ({"clients": ["b"]}, b"")}
    found, _ = nodes(told)
    found.look()
    found.hear(next(iter(found.grid_client.receive())))
    told[1] = ({"clients": ["a"]}, b"")
    found.wait(["a", "b"], 2, 1.0)
    assert found["a"] == 1


def test_a_trainer_that_is_blank_for_ever_is_given_up() -> None:
    world = World()
    for _ in range(2):
        world.state, _ = world.server.step(world.state, world.round().values())
    world.behave["a"] = lambda message: Incoming(message.key, {"behind": 0}, b"")
    before = len(world.grid_client.sent)
    assert isinstance(world.round()["a"].update, BadUpdate)
    assert len(world.grid_client.sent) - before == 4 + MAX_RESENDS


def test_a_bad_update_takes_nobodys_place() -> None:
    world = World(sample=4, keep=3)

    def not_a_number(message: Outgoing) -> Incoming:
        update = ClientUpdate.from_bytes(world.good(message).blob, "a")
        bad = {name: {m: t * torch.nan for m, t in found.items()} for name, found in update.factors.items()}
        return Incoming(message.key, {}, replace(update, factors=bad).to_bytes())

    world.behave["a"] = not_a_number
    found = world.round()
    assert isinstance(found["a"].update, BadUpdate)
    assert sum(isinstance(answer.update, ClientUpdate) for answer in found.values()) == 3


def test_a_rank_that_the_server_does_not_take_is_refused() -> None:
    for rank in (17, 10**9, True, "4", None):
        warnings: list[str] = []
        grid_client = GridClient(
            lambda message, rank=rank: Incoming(message.key, {"rank": rank, "base": "w"}, b""), [1]
        )  # type: ignore[misc]
        found = NodeRegistry(grid_client, ["a"], {1: "a"}, {}, warnings.append, most=16)  # type: ignore[arg-type]
        found.look()
        for received in grid_client.receive():
            found.hear(received)
        assert "a" not in found
        assert "the server takes at most 16" in warnings[0]


class Grid:
    """Flower's, with replies made by hand: number of a message → what pulling it gives, or raises."""

    def __init__(self, replies: dict[str, Any]) -> None:
        self.replies = replies

    def pull_messages(self, numbers: list[str]) -> list[Any]:
        found = []
        for number in numbers:
            reply = self.replies.pop(number, None)
            if isinstance(reply, Exception):
                raise reply
            found += [reply] if reply is not None else []
        return found


def message(replies_to: str, **facts: Any) -> Any:
    metadata = SimpleNamespace(reply_to_message_id=replies_to)
    content = RecordDict({"message": ConfigRecord(facts)} if facts else {})
    return SimpleNamespace(metadata=metadata, has_error=lambda: False, content=content)


def test_what_one_node_sends_is_never_another_nodes_and_costs_no_others() -> None:
    grid = Grid({"1": message("2", blob=b"forged"), "2": ValueError("not a message"), "3": message("3", blob=b"mine")})
    grid_client = RealMail(grid, believed=False)  # type: ignore[arg-type]
    grid_client._open = {"1": "a", "2": "b", "3": "c", "4": "d"}
    found = {received.key: received for received in grid_client.receive()}
    assert set(found) == {"a", "b", "c"}
    assert found["a"].error == "its reply can't be read: it replies to another message"
    assert found["b"].error == "its reply can't be read: not a message"
    assert found["c"].blob == b"mine"
    assert grid_client._open == {"4": "d"}


def test_no_blob_breaks_whoever_reads_it() -> None:
    good = World().good(
        Outgoing(RoundKey(0, 0, "a"), 1, "train", World().server.broadcast(World().state, "a").to_bytes())
    )
    _, facts = unpack(good.blob)
    odd = pack({"zzz/x": torch.ones(2)}, {**facts, "factors": ["zzz"], "changed": {}})
    deep = json.dumps({"__metadata__": {"fedelta": "[" * 100_000}}).encode()
    nested = b"[" * 200_000
    for blob in (odd, struct.pack("<Q", len(deep)) + deep, struct.pack("<Q", len(nested)) + nested, b"", b"\0" * 8):
        world = World()
        world.behave["a"] = lambda message, blob=blob: Incoming(message.key, {}, blob)  # type: ignore[misc]
        assert isinstance(world.round()["a"].update, BadUpdate)
