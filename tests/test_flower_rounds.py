"""The engine's own part of a round over Flower: whom it asks, whom it waits for, and what it makes of what comes."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

pytest.importorskip("flwr.serverapp")

from fedelta.engines.flower import engine as engine_module
from fedelta.engines.flower import nodes as nodes_module
from fedelta.engines.flower.engine import FlowerEngine
from fedelta.engines.flower.mail import Letter, Received
from fedelta.engines.flower.nodes import NodeKey, Nodes
from fedelta.engines.rounds import Answer, Draw
from fedelta.errors import ClientFailed, FedeltaError
from fedelta.messages import Broadcast, ClientUpdate
from fedelta.stopwatch import Stopwatch
from test_server import CLIENTS, make, reply

NODES = {client: number for number, client in enumerate(CLIENTS, 1)}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (nodes_module, engine_module):
        monkeypatch.setattr(module, "POLL_S", 0.0)
    monkeypatch.setattr(nodes_module, "LOOK_S", 0.0)


class Mail:
    """As Flower's, with a script of what nodes answer.

    Args:
        answers: of a letter, what comes back: a reply, or None for silence.
        order: keys of clients in the order in which they come; others as they were sent.
    """

    def __init__(self, answers: Callable[[Letter], Received | None], nodes: Iterable[int], slow: str = "") -> None:
        self.answers = answers
        self.nodes = list(nodes)
        self.slow = slow
        self.waiting: list[Received] = []
        self.held: list[Received] = []
        self.sent: list[Letter] = []
        self.grid = self

    def get_node_ids(self) -> list[int]:
        return self.nodes

    def send(self, letters: Iterable[Letter]) -> None:
        for letter in letters:
            self.sent.append(letter)
            if (answer := self.answers(letter)) is not None:
                slow = getattr(letter.key, "client", None) == self.slow
                (self.held if slow else self.waiting).append(answer)

    def receive(self) -> Iterator[Received]:
        while self.waiting:
            yield self.waiting.pop(0)


def who(letter: Letter) -> Received:
    names = {number: client for client, number in NODES.items()}
    return Received(letter.key, {"clients": [names[letter.node]], "base": "w", "version": 0}, b"")


class World:
    """A server, its state, and clients that answer as they are told."""

    def __init__(self, method: str = "fedex", **settings: Any) -> None:
        self.server, self.state = make(method, **{"deadline": 0.05, **settings})
        self.warnings: list[str] = []
        self.behave: dict[str, Callable[[Letter], Received | None]] = {}
        self.mail = Mail(self.answer, NODES.values())
        self.nodes = Nodes(self.mail, CLIENTS, None, {}, self.warnings.append)  # type: ignore[arg-type]
        self.engine = FlowerEngine.__new__(FlowerEngine)
        self.engine.server, self.engine.nodes = self.server, self.nodes
        self.engine.mail, self.engine._late = self.mail, {}  # type: ignore[assignment]

    def answer(self, letter: Letter) -> Received | None:
        if isinstance(letter.key, NodeKey):
            return who(letter)
        if letter.key.client in self.behave:
            return self.behave[letter.key.client](letter)
        return self.good(letter)

    def good(self, letter: Letter) -> Received:
        broadcast = Broadcast.from_bytes(letter.blob)
        update = reply(self.server, self.state, broadcast.client, 10, float(NODES[broadcast.client]))
        return Received(letter.key, {}, update.to_bytes())

    def round(self, attempt: int = 0, absent: Iterable[str] = ()) -> dict[str, Answer]:
        draw = Draw(CLIENTS, frozenset(absent), attempt)
        answers = list(self.engine.answers(self.state, draw, Stopwatch(), Stopwatch()))
        assert [answer.client for answer in answers] == CLIENTS
        return {answer.client: answer for answer in answers}


def reason(answer: Answer) -> str:
    assert isinstance(answer.update, ClientFailed)
    return answer.update.reason


def test_all_who_answer_are_handed_on_in_order_with_their_bytes() -> None:
    world = World()
    found = world.round()
    assert all(isinstance(answer.update, ClientUpdate) for answer in found.values())
    assert all(answer.up.total > 0 and answer.down.total > 0 for answer in found.values())
    assert [letter.node for letter in world.mail.sent if not isinstance(letter.key, NodeKey)] == list(NODES.values())


def test_silence_failure_absence_and_a_node_that_is_away_are_told_apart() -> None:
    world = World()
    world.behave["a"] = lambda letter: None  # noqa: ARG005
    world.behave["b"] = lambda letter: Received(letter.key, {}, b"", "its node failed: out of memory")
    world.mail.nodes.remove(NODES["d"])
    found = world.round(absent=["c"])
    assert reason(found["a"]) == "TimeoutError: no reply within 0 s"
    assert reason(found["b"]) == "its node failed: out of memory"
    assert reason(found["c"]) == "TimeoutError: dropped out"
    assert reason(found["d"]) == "its site is away"
    assert found["a"].up.total == 0
    assert found["c"].down.total > 0


def test_the_first_to_come_make_the_round_and_the_last_is_late() -> None:
    world = World(sample=4, keep=3)
    world.mail.slow = "b"
    found = world.round()
    assert reason(found["b"]) == "3 others came first"
    assert sum(isinstance(answer.update, ClientUpdate) for answer in found.values()) == 3
    assert world.engine.late() == {}
    # It comes in the next round, to which it does not belong.
    world.mail.waiting += world.mail.held
    world.mail.slow = ""
    world.round(attempt=1)
    # Four answered this time, so that one of them is late as well.
    assert world.engine.late() == {"b": 0, "d": 0}
    assert world.engine.late() == {}


def test_more_at_once_than_a_round_keeps_are_late_too() -> None:
    world = World(sample=4, keep=2)
    found = world.round()
    assert [client for client, answer in found.items() if isinstance(answer.update, ClientUpdate)] == ["a", "b"]
    assert world.engine.late() == {"c": 0, "d": 0}


def test_a_blank_trainer_gets_every_patch_and_both_messages_count() -> None:
    world = World()
    for _ in range(2):
        world.state, _ = world.server.step(world.state, (_as_reply(each) for each in world.round().values()))
    assert (world.state.log.version, world.state.versions["a"]) == (2, 1)
    asked = []

    def blank(letter: Letter) -> Received:
        asked.append(Broadcast.from_bytes(letter.blob).patch.start)
        return Received(letter.key, {"behind": 0}, b"") if asked[-1] > 0 else world.good(letter)

    world.behave["a"] = blank
    found = world.round()
    assert asked == [1, 0]
    assert isinstance(found["a"].update, ClientUpdate)
    assert found["a"].down.total > found["b"].down.total + found["b"].down.adapter


def _as_reply(answer: Answer) -> Any:
    from fedelta.intake import Reply

    return Reply(answer.sent, answer.update)


def test_a_version_that_makes_no_sense_is_an_update_that_can_not_be_read() -> None:
    world = World()
    for version in (-1, 5, "0", True):
        world.behave["a"] = lambda letter, version=version: Received(letter.key, {"behind": version}, b"")  # type: ignore[misc]
        assert isinstance(world.round()["a"].update, FedeltaError)


def test_a_round_waits_for_its_quorum() -> None:
    world = World(min_clients=3)
    world.mail.nodes = [1, 2]
    with pytest.raises(FedeltaError, match=r"no node serves client c, d \(2 of 4 are there, expected 3\)"):
        world.round()


def nodes(answers: Any, names: dict[int, str] | None = None) -> tuple[Nodes, list[str]]:
    warnings: list[str] = []
    mail = Mail(lambda letter: Received(letter.key, *answers[letter.node]), answers)
    return Nodes(mail, ["a", "b"], names, {"classes": ["x"]}, warnings.append), warnings  # type: ignore[arg-type]


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
        found.hear(Received(NodeKey(2), changed, b""))
        assert warnings.pop() == f"b can't take part: {line}"


def test_a_node_that_is_starting_is_asked_again() -> None:
    told: dict[int, Any] = {1: ({"failed": "not yet"}, b""), 2: ({"clients": ["b"]}, b"")}
    found, _ = nodes(told)
    found.look()
    found.hear(next(iter(found.mail.receive())))
    told[1] = ({"clients": ["a"]}, b"")
    found.wait(["a", "b"], 2, 1.0)
    assert found["a"] == 1
