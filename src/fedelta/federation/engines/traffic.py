"""Bytes that a round sends and receives, by client."""

from collections.abc import Mapping

from fedelta.federation.records import Bytes
from fedelta.federation.reply import ClientReply
from fedelta.protocol.serialization import ByteCount


class Traffic:
    """Bytes of a round by client, over all its attempts."""

    def __init__(self) -> None:
        self.down: dict[str, ByteCount] = {}
        self.up: dict[str, ByteCount] = {}

    def count(self, reply: ClientReply) -> None:
        """Add the bytes of a reply and of its broadcast."""
        client = reply.client
        self.down[client] = self.down.get(client, ByteCount()).plus(reply.down)
        self.up[client] = self.up.get(client, ByteCount()).plus(reply.up)

    def total_down(self) -> Bytes:
        """Sum the bytes to all clients."""
        return _total(self.down)

    def total_up(self) -> Bytes:
        """Sum the bytes from all clients."""
        return _total(self.up)


def _total(counts: Mapping[str, ByteCount]) -> Bytes:
    total = ByteCount()
    for count in counts.values():
        total = total.plus(count)
    return {
        "adapter": total.adapter,
        "heads": total.heads,
        "patch": total.patch,
        "overhead": total.overhead,
        "total": total.total,
    }
