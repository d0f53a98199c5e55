"""The rounds of a run over Flower's grid, with one message per client and round."""

import time
from collections.abc import Iterator, Mapping

from fedelta.errors import FedeltaError
from fedelta.federation.engines.rounds import Draw, Engine, EngineContext
from fedelta.federation.membership import change_clients, why_not_join
from fedelta.federation.records import Events
from fedelta.federation.reply import ClientReply
from fedelta.federation.server import ServerState
from fedelta.flower.server.grid_client import Incoming
from fedelta.flower.server.node_registry import POLL_S, REMOVED, NodeRegistry
from fedelta.flower.server.round_exchange import RoundExchange, RoundKey
from fedelta.learning.model.base_model import fingerprint
from fedelta.learning.training.stopwatch import Stopwatch
from fedelta.runs.config import Config


def check_config(config: Config) -> None:
    """Check that a configuration can run over Flower. Call this before any process is started.

    Raises:
        FedeltaError: if it cannot.
    """
    if config.method.make().personal:
        raise FedeltaError(f"method {config.method.name} keeps factors at its clients: not over Flower yet")
    if config.training.stack != 1:
        raise FedeltaError(f"training.stack is {config.training.stack}, expected 1 over Flower")


class FlowerEngine(Engine):
    """An engine whose clients train on Flower's nodes.

    Args:
        context: the run.
        nodes: the nodes that serve the clients.
        rows: client → number of its rows, if the server has divided them. Sites state theirs when they join.
    """

    spare = True

    def __init__(self, context: EngineContext, nodes: NodeRegistry, rows: Mapping[str, int]) -> None:
        super().__init__(context)
        self.nodes = nodes
        self._rows = rows
        self.grid_client = nodes.grid_client
        # The clients store their own error feedback.
        self.trainer.error_feedback.clear()
        self.nodes.require_base(fingerprint(self.trainer.model.peft))
        self._late: dict[str, int] = {}
        self._bytes_late = 0
        self._caught_up: dict[str, int] = {}
        self._declined: dict[str, str] = {}

    def events(self) -> Events:
        events: Events = {"late": self._late, "bytes_late": self._bytes_late, "caught_up": self._caught_up}
        self._late, self._bytes_late, self._caught_up = {}, 0, {}
        return events

    def update_clients(self, state: ServerState) -> ServerState:
        self.nodes.refresh()
        left = [client for client in state.ranks if not self.nodes.admits(client)]
        joined: dict[str, int] = {}
        for client in self.nodes.clients:
            if client in state.ranks or client not in self.nodes:
                continue
            rank = self.nodes.capabilities[client].rank or 0
            if (reason := why_not_join(self.server, state, rank)) is None:
                joined[client] = self.nodes.ranks[client] = rank
            elif self._declined.get(client) != reason:
                self._declined[client] = reason
                self.observer.warn(f"{client} can't join this run: {reason}")
        for client, rank in joined.items():
            rows = self.nodes.capabilities[client].rows
            self.observer.say(f"round {state.round}: {client} joins with {rows} rows at rank {rank}")
        for client in left:
            self.nodes.ranks.pop(client, None)
            self.observer.say(f"round {state.round}: {client} is removed")
        return change_clients(self.server, state, joined, left)

    def replies(
        self,
        state: ServerState,
        draw: Draw,
        watch: Stopwatch,
        inside: Stopwatch,  # noqa: ARG002
    ) -> Iterator[ClientReply]:
        settings = self.server.settings
        # Wait until enough clients are online. The round does not wait for the others.
        self.nodes.wait(draw.clients, settings.min_clients, settings.deadline, self._count_late_reply)
        watch.lap("waiting")
        stated = {client: site.rows for client, site in self.nodes.capabilities.items() if site.rows is not None}
        exchange = RoundExchange(self.server, state, draw, self.nodes, self.grid_client, {**stated, **self._rows})
        watch.lap("messages")
        until = time.monotonic() + settings.deadline
        for client in draw.clients:
            while client not in exchange:
                if exchange.usable >= exchange.max_updates:
                    exchange.give_up(client, f"{exchange.max_updates} others came first")
                elif not self.nodes.admits(client):
                    exchange.give_up(client, REMOVED)
                elif time.monotonic() > until:
                    exchange.give_up(client, f"TimeoutError: no reply within {settings.deadline:.0f} s")
                elif not self._receive(exchange):
                    time.sleep(POLL_S)
            watch.lap("clients")
            yield exchange.reply(client)
        self._caught_up |= exchange.caught_up

    def _receive(self, exchange: RoundExchange) -> bool:
        """Process all replies that have arrived, and return whether there were any."""
        self.nodes.refresh()
        received = False
        for reply in self.grid_client.receive():
            received = True
            if not isinstance(reply.key, RoundKey):
                self.nodes.accept(reply)
            elif not exchange.accept(reply):
                self._count_late_reply(reply)
        return received

    def _count_late_reply(self, reply: Incoming) -> None:
        if isinstance(reply.key, RoundKey) and reply.blob:
            self._late[reply.key.client] = reply.key.round
            self._bytes_late += len(reply.blob)
