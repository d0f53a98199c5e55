"""One attempt at a round over Flower: what was sent to each client, and what it replied."""

from collections.abc import Mapping
from typing import NamedTuple

from flwr.app import MessageType

from fedelta.errors import BadUpdate, ClientFailed
from fedelta.federation.engines.rounds import Draw, read_update
from fedelta.federation.outliers import growth, is_suspect
from fedelta.federation.reply import ClientReply
from fedelta.federation.server import Server, ServerState
from fedelta.flower.server.grid_client import GridClient, Incoming, Outgoing
from fedelta.flower.server.node_registry import AWAY, NodeRegistry
from fedelta.lora.adapter import Shapes
from fedelta.protocol.messages import Broadcast, ClientUpdate
from fedelta.protocol.serialization import ByteCount, count_bytes
from fedelta.protocol.validation import receive

MAX_RESENDS = 3
"""How often in a round a client is sent the broadcast again because its trainer lacks patches."""


class RoundKey(NamedTuple):
    """Key of a broadcast and of its reply."""

    round: int
    attempt: int
    client: str


class RoundExchange:
    """Sends each client its broadcast, and collects the replies.

    Args:
        server: makes the broadcasts.
        state: the server's state at the start of the round.
        draw: the clients that take part.
        nodes: the nodes that serve them.
        grid_client: sends messages to the nodes.
        rows: client → number of its rows, as far as they are known.

    Attributes:
        max_updates: number of usable updates after which further ones are refused.
        usable: number of usable updates received.
        caught_up: client → version of its base, if it lacked patches.
    """

    def __init__(
        self,
        server: Server,
        state: ServerState,
        draw: Draw,
        nodes: NodeRegistry,
        grid_client: GridClient,
        rows: Mapping[str, int],
    ) -> None:
        self._server = server
        self._state = state
        self._attempt = draw.attempt
        self._nodes = nodes
        self._grid_client = grid_client
        self._rows = rows
        self._broadcasts = {client: server.broadcast(state, client) for client in draw.clients}
        self._down = dict.fromkeys(draw.clients, ByteCount())
        self._up = dict.fromkeys(draw.clients, ByteCount())
        self._outcomes: dict[str, ClientUpdate | Exception] = {}
        self.max_updates = server.settings.keep or len(draw.clients)
        self.usable = 0
        self.caught_up: dict[str, int] = {}
        self._resends = dict.fromkeys(draw.clients, 0)
        for client in draw.clients:
            blob = self._broadcasts[client].to_bytes()
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
        return client in self._outcomes

    def give_up(self, client: str, reason: str) -> None:
        """Continue the round without this client."""
        self._outcomes[client] = ClientFailed(client, reason)

    def accept(self, reply: Incoming) -> bool:
        """Process a reply, and return False if it belongs to another round or is too late for this one."""
        key = reply.key
        client = key.client
        late = client in self._outcomes or self.usable >= self.max_updates
        if key[:2] != (self._state.round, self._attempt) or late:
            return False
        if reply.error is not None:
            self.give_up(client, reply.error)
            return True
        version = reply.facts.get("behind")
        if type(version) is int and 0 <= version < self._state.log.version and self._resends[client] < MAX_RESENDS:
            # A restarted trainer lacks the earlier patches, so it is sent all of them. It may restart more than once.
            self._resends[client] += 1
            self.caught_up[client] = version
            blob = self._server.broadcast(self._state, client, since=version).to_bytes()
            self._down[client] = self._down[client].plus(count_bytes(blob))
            self._grid_client.send([self._message(client, blob)])
            return True
        self._outcomes[client] = self._read(client, reply)
        return True

    def _read(self, client: str, reply: Incoming) -> ClientUpdate | Exception:
        """Read and validate an update, so that one that is not valid does not use up one of `max_updates`."""
        sent = self._broadcasts[client]
        if len(reply.blob) > (max_bytes := _max_bytes(sent, self._state.log.shapes)):
            return BadUpdate(client, f"its update has {len(reply.blob)} bytes, expected at most {max_bytes}")
        update = read_update(client, reply.facts, reply.blob)
        if not isinstance(update, ClientUpdate):
            return update
        self._up[client] = count_bytes(reply.blob)
        try:
            contribution = receive(update, sent, self._state.log.shapes, rows=self._rows.get(client))
        except BadUpdate as error:
            return error
        # An update that has to be compared with the others may turn out to be unusable.
        self.usable += not is_suspect(growth(contribution), self._server.settings.max_growth)
        return update

    def reply(self, client: str) -> ClientReply:
        """Return a client's reply, and free the memory of its broadcast and update."""
        broadcast, update = self._broadcasts.pop(client), self._outcomes[client]
        # The client still counts as answered, but its factors are no longer referenced.
        self._outcomes[client] = ClientFailed(client, "answered")
        return ClientReply(broadcast, update, self._down[client], self._up[client], rows=self._rows.get(client))


def _max_bytes(sent: Broadcast, shapes: Shapes) -> int:
    """Maximum size of an update: its numbers in float32 (heads in float64), and more than its names and facts need."""
    numbers = sum(sent.rank * (m + n + sent.rank) for m, n in shapes.values())
    numbers += sum(2 * head.numel() for head in sent.heads.values())
    names = sum(len(name) + 256 for name in (*shapes, *sent.heads))
    return 4 * numbers + 8 * names + 2**20
