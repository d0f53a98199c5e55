"""The rounds of a run over Flower's grid: one message a client and round."""

import time
from collections.abc import Iterator
from typing import Any

from fedelta.errors import FedeltaError
from fedelta.federation.engines.rounds import Draw, Engine, EngineContext
from fedelta.federation.records import Events
from fedelta.federation.reply import ClientReply
from fedelta.federation.server import ServerState
from fedelta.flower.server.node_registry import POLL_S, NodeRegistry
from fedelta.flower.server.round_exchange import RoundExchange, RoundKey
from fedelta.learning.model.base_model import fingerprint
from fedelta.learning.training.stopwatch import Stopwatch
from fedelta.runs.config import Config


def check(config: Config) -> None:
    """Whether a configuration can be run over Flower.

    Raises:
        FedeltaError: if not, before anything is started.
    """
    if config.method.make().personal:
        raise FedeltaError(f"method {config.method.name} keeps factors at its clients: not over Flower yet")
    if config.training.stack != 1:
        raise FedeltaError(f"training.stack is {config.training.stack}, but over Flower it is 1")


class FlowerEngine(Engine):
    """Clients are where their nodes are.

    Args:
        nodes: that serve them.
    """

    spare = True

    def __init__(self, context: EngineContext, nodes: NodeRegistry) -> None:
        super().__init__(context)
        self.nodes = nodes
        self.grid_client = nodes.grid_client
        # What clients' messages have left out is with them.
        self.trainer.error_feedback.clear()
        self.nodes.expect(fingerprint(self.trainer.model.peft))
        self._late: dict[str, int] = {}
        self._bytes_late = 0
        self._caught_up: dict[str, int] = {}

    def events(self) -> Events:
        found: Events = {"late": self._late, "bytes_late": self._bytes_late, "caught_up": self._caught_up}
        self._late, self._bytes_late, self._caught_up = {}, 0, {}
        return found

    def replies(
        self,
        state: ServerState,
        draw: Draw,
        watch: Stopwatch,
        inside: Stopwatch,  # noqa: ARG002
    ) -> Iterator[ClientReply]:
        settings = self.server.settings
        # A round for which too few are there waits; one that has enough goes on without the others.
        self.nodes.wait(draw.clients, settings.min_clients, settings.deadline, self._late_reply)
        watch.lap("waiting")
        exchange = RoundExchange(self.server, state, draw, self.nodes, self.grid_client)
        watch.lap("messages")
        until = time.monotonic() + settings.deadline
        for client in draw.clients:
            while client not in exchange:
                if exchange.usable >= exchange.kept:
                    exchange.give_up(client, f"{exchange.kept} others came first")
                elif time.monotonic() > until:
                    exchange.give_up(client, f"TimeoutError: no reply within {settings.deadline:.0f} s")
                elif not self._receive(exchange):
                    time.sleep(POLL_S)
            watch.lap("clients")
            yield exchange.reply(client)
        self._caught_up |= exchange.caught_up

    def _receive(self, exchange: RoundExchange) -> bool:
        """Take what has come, and say whether anything has."""
        self.nodes.look()
        found = False
        for reply in self.grid_client.receive():
            found = True
            if not isinstance(reply.key, RoundKey):
                self.nodes.hear(reply)
            elif not exchange.take(reply):
                self._late_reply(reply)
        return found

    def _late_reply(self, reply: Any) -> None:
        if isinstance(reply.key, RoundKey) and reply.blob:
            self._late[reply.key.client] = reply.key.round
            self._bytes_late += len(reply.blob)
