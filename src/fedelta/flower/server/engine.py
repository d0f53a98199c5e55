"""The rounds of a run over Flower's grid, with one message per client and round."""

import time
from collections.abc import Iterator, Mapping

from fedelta.errors import FedeltaError
from fedelta.federation.engines.rounds import Draw, Engine, EngineContext
from fedelta.federation.records import Events
from fedelta.federation.reply import ClientReply
from fedelta.federation.server import ServerState
from fedelta.flower.server.grid_client import Incoming
from fedelta.flower.server.node_registry import POLL_S, NodeRegistry
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

    def events(self) -> Events:
        events: Events = {"late": self._late, "bytes_late": self._bytes_late, "caught_up": self._caught_up}
        self._late, self._bytes_late, self._caught_up = {}, 0, {}
        return events

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
