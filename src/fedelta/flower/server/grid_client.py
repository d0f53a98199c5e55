"""Messages over Flower's grid and their replies, each known by a key of ours, whenever it comes."""

import secrets
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import httpx
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedelta.errors import FedeltaError, one_line

TTL_S = 43200.0
"""Of Flower: how long a message is of use."""


class Outgoing(NamedTuple):
    """A message to a node.

    Args:
        key: by which its reply will be known.
        node: Flower's number of it.
        kind: Flower's type of message.
        blob: its content.
        patience: seconds after which its reply is of no use.
    """

    key: Any
    node: int
    kind: str
    blob: bytes
    patience: float = 0.0


class Incoming(NamedTuple):
    """A reply: its facts and blob, or in one line why there is none."""

    key: Any
    facts: dict[str, Any]
    blob: bytes
    error: str | None = None


class GridClient:
    """Sends, and gives what has come since.

    Args:
        grid: of the running ServerApp.
        believed: whether nodes are our own. Flower takes from a reply itself to what it replies; of others each is
            asked for by itself, so that one that can't be read costs nobody else's, and none can be sent for another.
    """

    def __init__(self, grid: Grid, believed: bool = True) -> None:
        self.grid = grid
        self._believed = believed
        self._open: dict[str, Any] = {}
        self._lost: list[Any] = []

    def send(self, messages: Iterable[Outgoing]) -> None:
        """Hand over messages.

        Raises:
            FedeltaError: if Flower does not take them.
        """
        messages = list(messages)
        if not messages:
            return
        messages = [
            Message(
                # The token makes the number of a message, which is a digest, one that nobody can guess.
                RecordDict({"message": ConfigRecord({"blob": each.blob, "token": secrets.token_hex(16)})}),
                dst_node_id=each.node,
                message_type=each.kind,
                ttl=max(TTL_S, 2 * each.patience),
            )
            for each in messages
        ]
        numbers = list(self.grid.push_messages(messages))
        if len(numbers) < len(messages):
            raise FedeltaError(f"Flower took {len(numbers)} of {len(messages)} messages; are they too large for it?")
        for number, message in zip(numbers, messages, strict=True):
            if number:
                self._open[number] = message.key
            else:
                self._lost.append(message.key)

    def receive(self) -> Iterator[Incoming]:
        """What has come, in the order in which Flower has it."""
        while self._lost:
            yield Incoming(self._lost.pop(), {}, b"", "its node is gone")
        if not self._believed:
            for number in list(self._open):
                try:
                    replies = list(self.grid.pull_messages([number]))
                    found = [self._read(number, reply) for reply in replies[:1]]
                except httpx.HTTPError:
                    # The SuperLink, not the node.
                    raise
                except Exception as error:
                    found = [Incoming(self._open.pop(number), {}, b"", f"its reply can't be read: {one_line(error)}")]
                yield from found
        elif self._open:
            for reply in self.grid.pull_messages(list(self._open)):
                if reply.metadata.reply_to_message_id in self._open:
                    yield self._read(reply.metadata.reply_to_message_id, reply)

    def _read(self, number: str, reply: Message) -> Incoming:
        if reply.metadata.reply_to_message_id != number:
            raise FedeltaError("it replies to another message")
        if reply.has_error():
            return Incoming(self._open.pop(number), {}, b"", f"its node failed: {one_line(reply.error.reason)}")
        record = reply.content.config_records.get("message", {})
        blob = record.get("blob", b"")
        return Incoming(self._open.pop(number), dict(record), blob if isinstance(blob, bytes) else b"")
