"""Which node serves which client. Each node is asked once, when it comes online or comes back."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flwr.app import MessageType

from fedelta.errors import FedeltaError, TooFewUpdates, listed
from fedelta.flower.server.grid_client import GridClient, Incoming, Outgoing
from fedelta.protocol.failures import FAILURE, failure_words, is_refusal
from fedelta.protocol.validation import MAX_EXAMPLES

AWAY = "its site is away"
"""Reason why a client whose node is offline is skipped."""

REMOVED = "its site was removed"
"""Reason why a client is skipped whose key is no longer in the server's folder."""
POLL_S = 0.1
REFRESH_S = 1.0
"""Minimum seconds between two requests for the list of nodes that are online."""


class NodeKey(NamedTuple):
    """Key of the query that asks a node which client it serves."""

    node: int


class Capabilities(NamedTuple):
    """What a site states about itself.

    Args:
        base: fingerprint of its base model.
        rank: the rank that it can afford; None if the server's settings determine it.
        rows: number of rows that it trains on; None if the server's settings determine it.
    """

    base: str
    rank: int | None
    rows: int | None

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> "Capabilities":
        """Read them from a node's reply. A rank or a number of rows that is not a possible one becomes None."""
        rank, rows = (
            value if type(value := facts.get(key)) is int and 0 < value <= MAX_EXAMPLES else None
            for key in ("rank", "rows")
        )
        return cls(str(facts.get("base")), rank, rows)


class NodeRegistry:
    """The nodes of a federation, and the clients that they serve.

    Args:
        grid_client: sends messages to the nodes.
        clients: the clients that have to be served.
        registered: node → the client that its key is registered for; None if nodes may name their own clients.
        question: the JSON object that each node is asked with.
        warn: called with a line about each node that cannot take part.
        max_rank: the highest rank that a site may state; None if ranks are not checked.
        follow: returns `registered` as it is at the moment; None if it does not change.

    Attributes:
        capabilities: client → what its site states about itself.
        ranks: client → the rank that it must have, once that is known.
        base: fingerprint that each site's base model must have, once that is known.
    """

    def __init__(
        self,
        grid_client: GridClient,
        clients: Sequence[str],
        registered: Mapping[int, str] | None,
        question: Mapping[str, Any],
        warn: Callable[[str], None],
        max_rank: int | None = None,
        follow: Callable[[], Mapping[int, str]] | None = None,
    ) -> None:
        self.grid_client = grid_client
        self.clients = list(clients)
        self._registered = registered
        self._question = question
        self._warn = warn
        self._max_rank = max_rank
        self._follow = follow
        self._asked: set[int] = set()
        self._reported: dict[int, str] = {}
        self._last_refresh = -REFRESH_S
        self._online: set[int] = set()
        self._nodes: dict[str, int] = {}
        self.base: str | None = None
        self.ranks: dict[str, int | None] = {}
        self.capabilities: dict[str, Capabilities] = {}

    def __getitem__(self, client: str) -> int:
        return self._nodes[client]

    def __contains__(self, client: str) -> bool:
        return self._nodes.get(client) in self._online

    def admits(self, client: str) -> bool:
        """Return whether a node is registered for this client, or nodes may name their own clients."""
        return self._registered is None or client in self._registered.values()

    def require_base(self, base: str) -> None:
        """Require this base model and the current ranks, from the known sites and from those that come later.

        Args:
            base: fingerprint of the base model.

        Raises:
            FedeltaError: if a known site has another base model.
        """
        self.ranks = {client: site.rank for client, site in self.capabilities.items()} | self.ranks
        for client, site in self.capabilities.items():
            if site.base != base:
                raise FedeltaError(f"client {client}: the weights of its base model are not the server's")
        self.base = base

    def refresh(self) -> None:
        """Update the list of nodes that are online, and query the new ones.

        Does nothing if the last refresh was less than `REFRESH_S` seconds ago.
        """
        if time.monotonic() - self._last_refresh < REFRESH_S:
            return
        self._last_refresh = time.monotonic()
        if self._follow is not None:
            self._registered = self._follow()
            self.clients = sorted({*self.clients, *self._registered.values()})
            # A client whose key was removed or replaced is not served by its old node.
            self._nodes = {c: node for c, node in self._nodes.items() if self._registered.get(node) == c}
        self._online = set(self.grid_client.grid.get_node_ids())
        if self._registered is not None:
            self._online &= self._registered.keys()
        # A node that was offline may have come back as a different process.
        self._asked &= self._online
        new = sorted(self._online - self._asked)
        # Its answer may have changed too, so it serves no client until it has answered again.
        self._nodes = {client: node for client, node in self._nodes.items() if node not in new}
        self._asked |= set(new)
        self.grid_client.send(Outgoing(NodeKey(node), node, MessageType.QUERY, self._query(node)) for node in new)

    def _query(self, node: int) -> bytes:
        name = self._registered.get(node) if self._registered is not None else None
        return json.dumps({**self._question, "client": name}).encode()

    def accept(self, reply: Incoming) -> None:
        """Process a node's answer to its query."""
        node = reply.key.node
        if reply.error is not None:
            # It may still be starting, or restarting: ask again.
            self._asked.discard(node)
            return
        if FAILURE in reply.facts:
            self._report_failure(node, reply.facts)
            return
        for client in self.clients_of(node, reply.facts):
            # If nodes name their own clients, the latest node wins: its predecessor was restarted.
            if client in self.clients:
                site = Capabilities.read(reply.facts)
                if (reason := self._mismatch(client, site)) is None:
                    self._nodes[client], self.capabilities[client] = node, site
                else:
                    self._warn(f"{client} can't take part: {reason}")

    def _report_failure(self, node: int, facts: Mapping[str, Any]) -> None:
        """Warn about a node that cannot take part, and ask again if that may change. Equal lines appear once."""
        if not is_refusal(facts):
            self._asked.discard(node)
        words = failure_words(facts, self._question.get("settings"))
        if self._reported.get(node) != words:
            self._reported[node] = words
            label = self._registered.get(node, f"node {node}") if self._registered is not None else f"node {node}"
            self._warn(f"{label} can't take part: {words}")

    def _mismatch(self, client: str, site: Capabilities) -> str | None:
        """Return why a site cannot take part, or None if it can."""
        if self.base is not None and site.base != self.base:
            return "the weights of its base model are not the server's"
        if self._max_rank is not None and (site.rank is None or site.rank > self._max_rank):
            return f"its rank is {site.rank}, the server takes at most {self._max_rank} (ranks.high)"
        if self._max_rank is not None and site.rows is None:
            return f"it does not state its number of rows, expected 1 to {MAX_EXAMPLES}"
        before = self.ranks.get(client, site.rank)
        return None if before == site.rank else f"its rank was {before} and is {site.rank}"

    def clients_of(self, node: int, facts: Mapping[str, Any]) -> list[str]:
        """Return the clients that a node serves: by its key, or by the facts of its reply if there are no keys."""
        if self._registered is not None:
            return [self._registered[node]] if node in self._registered else []
        clients = facts.get("clients")
        return [str(client) for client in clients] if isinstance(clients, list) else []

    def list_online(self) -> set[int]:
        """Return the numbers of the nodes that are online, without a query to them."""
        if time.monotonic() - self._last_refresh >= REFRESH_S:
            self._last_refresh = time.monotonic()
            self._online = set(self.grid_client.grid.get_node_ids())
        return set(self._online)

    def wait(
        self,
        clients: Sequence[str],
        min_clients: int,
        timeout: float,
        on_other_reply: Callable[[Incoming], None] | None = None,
    ) -> None:
        """Wait until nodes serve at least `min_clients` of `clients`.

        Args:
            clients: the clients to wait for.
            min_clients: how many of them must be served.
            timeout: seconds to wait.
            on_other_reply: called with each reply that does not answer a query of this registry.

        Raises:
            TooFewUpdates: if too few are served after `timeout` seconds; it names the missing clients.
        """
        until = time.monotonic() + timeout
        while True:
            self.refresh()
            for reply in self.grid_client.receive():
                if isinstance(reply.key, NodeKey):
                    self.accept(reply)
                elif on_other_reply is not None:
                    on_other_reply(reply)
            missing = [client for client in clients if client not in self]
            if len(clients) - len(missing) >= min_clients:
                return
            if time.monotonic() > until:
                raise TooFewUpdates(
                    f"no node serves client {listed(missing)} "
                    f"({len(clients) - len(missing)} of {len(clients)} are there, expected {min_clients})",
                    dict.fromkeys(missing, AWAY),
                )
            time.sleep(POLL_S)
