"""The result of one client's round, as an engine passes it to the server."""

from typing import NamedTuple

from fedelta.protocol.messages import Broadcast, ClientUpdate
from fedelta.protocol.serialization import ByteCount


class ClientReply(NamedTuple):
    """The broadcast that a client was sent, and its update or the error that replaced it.

    Args:
        sent: the broadcast.
        update: the client's update, or the error that explains why there is none.
        down: bytes of the broadcast as serialized.
        up: bytes of the update as serialized; zero if none arrived.
        loss: validation loss of the client's own model, if the server measured it.
        rows: number of rows of the client, as far as the server knows.
    """

    sent: Broadcast
    update: ClientUpdate | Exception
    down: ByteCount = ByteCount()
    up: ByteCount = ByteCount()
    loss: float | None = None
    rows: int | None = None

    @property
    def client(self) -> str:
        return self.sent.client
