"""One attempt at a round over Flower: what was sent to whom, and what has come of it."""

from typing import NamedTuple

from flwr.app import MessageType

from fedelta.errors import BadUpdate, ClientFailed
from fedelta.federation.engines.rounds import Draw, read_update
from fedelta.federation.reply import ClientReply
from fedelta.federation.server import Server, ServerState
from fedelta.flower.server.grid_client import GridClient, Incoming, Outgoing
from fedelta.flower.server.node_registry import AWAY, NodeRegistry
from fedelta.protocol.messages import ClientUpdate
from fedelta.protocol.serialization import ByteCount, count_bytes
from fedelta.protocol.validation import receive

MAX_RESENDS = 3
"""How often in a round a trainer may come back blank."""


class RoundKey(NamedTuple):
    """What a reply belongs to."""

    round: int
    attempt: int
    client: str


class RoundExchange:
    """Sends each client its broadcast, and keeps what comes back.

    Args:
        server: makes the broadcasts.
        state: of the round.
        draw: who takes part.
        nodes: that serve them.
        grid_client: to the nodes.

    Attributes:
        usable: updates that have come and can be used.
        caught_up: client → version that its base had come back with.
    """

    def __init__(
        self, server: Server, state: ServerState, draw: Draw, nodes: NodeRegistry, grid_client: GridClient
    ) -> None:
        self._server = server
        self._state = state
        self._attempt = draw.attempt
        self._nodes = nodes
        self._grid_client = grid_client
        self._sent = {client: server.broadcast(state, client) for client in draw.clients}
        self._down = dict.fromkeys(draw.clients, ByteCount())
        self._up = dict.fromkeys(draw.clients, ByteCount())
        self._came: dict[str, ClientUpdate | Exception] = {}
        self.kept = server.settings.keep or len(draw.clients)
        self.usable = 0
        self.caught_up: dict[str, int] = {}
        self._again = dict.fromkeys(draw.clients, 0)
        for client in draw.clients:
            blob = self._sent[client].to_bytes()
            self._down[client] = count_bytes(blob)
            if client in draw.absent:
                self.give_up(client, "TimeoutError: dropped out")
            elif client not in nodes:
                self.give_up(client, AWAY)
            else:
                self._grid_client.send([self._message(client, blob)])

    def _message(self, client: str, blob: bytes) -> Outgoing:
        key = RoundKey(self._state.round, self._attempt, client)
        return Outgoing(key, self._nodes[client], MessageType.TRAIN, blob, self._server.settings.deadline)

    def __contains__(self, client: str) -> bool:
        return client in self._came

    def give_up(self, client: str, reason: str) -> None:
        """Go on without this client."""
        self._came[client] = ClientFailed(client, reason)

    def take(self, reply: Incoming) -> bool:
        """Take a reply; false if it is of another round, or too late for this one."""
        key = reply.key
        client = key.client
        if key[:2] != (self._state.round, self._attempt) or client in self._came or self.usable >= self.kept:
            return False
        if reply.error is not None:
            self.give_up(client, reply.error)
            return True
        version = reply.facts.get("behind")
        if type(version) is int and 0 <= version < self._state.log.version and self._again[client] < MAX_RESENDS:
            # A trainer that came back blank, perhaps more than once, gets every patch again.
            self._again[client] += 1
            self.caught_up[client] = version
            blob = self._server.broadcast(self._state, client, since=version).to_bytes()
            self._down[client] = self._down[client].plus(count_bytes(blob))
            self._grid_client.send([self._message(client, blob)])
            return True
        update = read_update(client, reply.facts, reply.blob)
        if isinstance(update, ClientUpdate):
            self._up[client] = count_bytes(reply.blob)
            try:
                # Before it takes the place of another one's.
                receive(update, self._sent[client], self._state.log.shapes)
                self.usable += 1
            except BadUpdate as error:
                update = error
        self._came[client] = update
        return True

    def reply(self, client: str) -> ClientReply:
        """What this client was sent and what came of it, which is then let go."""
        sent, update = self._sent.pop(client), self._came[client]
        # Supervised as an answer that is there, without the factors.
        self._came[client] = ClientFailed(client, "answered")
        return ClientReply(sent, update, self._down[client], self._up[client])
