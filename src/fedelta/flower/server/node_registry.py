"""Which node serves which client: asked once of every node, in one message, and again of those that come later."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flwr.app import MessageType

from fedelta.errors import FedeltaError, TooFewUpdates, one_line
from fedelta.flower.server.grid_client import GridClient, Incoming, Outgoing

AWAY = "its site is away"

POLL_S = 0.1
LOOK_S = 1.0
"""Seconds between two looks for nodes that have come or gone."""


class NodeKey(NamedTuple):
    """What a node's answer belongs to."""

    node: int


class FarewellKey(NamedTuple):
    """What a node's last answer belongs to."""

    node: int


class Capabilities(NamedTuple):
    """What a site says of itself.

    Args:
        base: fingerprint of its base model.
        rank: that it can afford, None if the server's settings say it.
        rows: that it trains on, None likewise.
    """

    base: str
    rank: int | None
    rows: int | None

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> "Capabilities":
        """From an answer, whatever it holds."""
        rank, rows = (value if type(value := facts.get(key)) is int and value > 0 else None for key in ("rank", "rows"))
        return cls(str(facts.get("base")), rank, rows)


class NodeRegistry:
    """The nodes of a federation.

    Args:
        grid_client: to them.
        clients: who is to be served.
        names: node → the client that it was registered for; None where nodes are believed.
        question: what every node is asked, as JSON.
        warn: is told of those who refuse.
        most: the highest rank that a site may say.

    Attributes:
        capabilities: client → what its site says of itself.
        ranks: client → what its rank must be, once it is known.
        base: fingerprint that a site's base model must have, once it is known.
    """

    def __init__(
        self,
        grid_client: GridClient,
        clients: Sequence[str],
        names: Mapping[int, str] | None,
        question: Mapping[str, Any],
        warn: Callable[[str], None],
        most: int | None = None,
    ) -> None:
        self.grid_client = grid_client
        self.clients = list(clients)
        self._names = names
        self._question = question
        self._warn = warn
        self._most = most
        self._asked: set[int] = set()
        self._looked = -LOOK_S
        self._online: set[int] = set()
        self._nodes: dict[str, int] = {}
        self.base: str | None = None
        self.ranks: dict[str, int | None] = {}
        self.capabilities: dict[str, Capabilities] = {}

    def __getitem__(self, client: str) -> int:
        return self._nodes[client]

    def __contains__(self, client: str) -> bool:
        return self._nodes.get(client) in self._online

    def expect(self, base: str) -> None:
        """Ask for this base model from now on, also of those who are there.

        Raises:
            FedeltaError: naming a client whose is another.
        """
        self.ranks = {client: found.rank for client, found in self.capabilities.items()} | self.ranks
        for client, found in self.capabilities.items():
            if found.base != base:
                raise FedeltaError(f"client {client}: the weights of its base model are not the server's")
        self.base = base

    def look(self) -> None:
        """See who is there, and ask those who are new; not more often than is of use."""
        if time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        self._online = set(self.grid_client.grid.get_node_ids())
        # A node that was away may have come back as somebody else's process.
        self._asked &= self._online
        new = sorted(self._online - self._asked)
        # It may have changed, too: it serves nobody until it has answered.
        self._nodes = {client: node for client, node in self._nodes.items() if node not in new}
        self._asked |= set(new)
        self.grid_client.send(Outgoing(NodeKey(node), node, MessageType.QUERY, self._ask(node)) for node in new)

    def _ask(self, node: int) -> bytes:
        name = self._names.get(node) if self._names is not None else None
        return json.dumps({**self._question, "client": name}).encode()

    def hear(self, reply: Incoming) -> None:
        """Take the answer of a node."""
        node = reply.key.node
        if reply.error is not None or "failed" in reply.facts:
            # It may be starting still, or starting again.
            self._asked.discard(node)
            return
        if "refused" in reply.facts:
            who = self._names.get(node, f"node {node}") if self._names is not None else f"node {node}"
            self._warn(f"{who} can't take part: {one_line(reply.facts['refused'])}")
            return
        for name in self._named(node, reply.facts):
            # Where nodes are believed, the last that names a client has it: it has been started again.
            if name in self.clients:
                found = Capabilities.read(reply.facts)
                if (reason := self._unfit(name, found)) is None:
                    self._nodes[name], self.capabilities[name] = node, found
                else:
                    self._warn(f"{name} can't take part: {reason}")

    def _unfit(self, name: str, found: Capabilities) -> str | None:
        if self.base is not None and found.base != self.base:
            return "the weights of its base model are not the server's"
        if self._most is not None and (found.rank is None or found.rank > self._most):
            return f"its rank is {found.rank}, the server takes at most {self._most} (ranks.high)"
        before = self.ranks.get(name, found.rank)
        return None if before == found.rank else f"its rank was {before} and is {found.rank}"

    def _named(self, node: int, facts: Mapping[str, Any]) -> list[str]:
        if self._names is not None:
            return [self._names[node]] if node in self._names else []
        names = facts.get("clients")
        return [str(name) for name in names] if isinstance(names, list) else []

    def dismiss(self, patience: float) -> None:
        """Tell everybody that the run has ended.

        Args:
            patience: seconds to wait for those who are still at work for a round that went on without them.
        """
        farewell = json.dumps({"finished": True}).encode()
        self._looked = -LOOK_S
        self.look()
        nodes = set(self._nodes.values()) & self._online
        self.grid_client.send(Outgoing(FarewellKey(node), node, MessageType.QUERY, farewell) for node in sorted(nodes))
        until = time.monotonic() + patience
        while nodes and time.monotonic() < until:
            nodes -= {reply.key.node for reply in self.grid_client.receive() if isinstance(reply.key, FarewellKey)}
            time.sleep(POLL_S)

    def wait(
        self, clients: Sequence[str], number: int, patience: float, other: Callable[[Incoming], None] | None = None
    ) -> None:
        """Until so many of these clients are served, or patience ends.

        Args:
            other: is given replies that are of no node's answer.

        Raises:
            TooFewUpdates: in the end, naming those that are missing.
        """
        until = time.monotonic() + patience
        while True:
            self.look()
            for reply in self.grid_client.receive():
                if isinstance(reply.key, NodeKey):
                    self.hear(reply)
                elif other is not None:
                    other(reply)
            missing = [client for client in clients if client not in self]
            if len(clients) - len(missing) >= number:
                return
            if time.monotonic() > until:
                raise TooFewUpdates(
                    f"no node serves client {', '.join(missing[:5])}{' …' * (len(missing) > 5)} "
                    f"({len(clients) - len(missing)} of {len(clients)} are there, expected {number})",
                    dict.fromkeys(missing, AWAY),
                )
            time.sleep(POLL_S)
