"""Messages over Flower's grid and their replies, matched by a key that the caller chooses."""

import secrets
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import httpx
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedelta.errors import FedeltaError, one_line

TTL_S = 43200.0
"""Minimum lifetime of a message in Flower's grid."""
NODE_ERRORS = {
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "it can't load fedelta",
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "its program raised an error",
    ErrorCode.CLIENT_APP_CRASHED: "its program crashed",
    ErrorCode.MESSAGE_UNAVAILABLE: "the message to it is gone",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its reply did not arrive",
    ErrorCode.NODE_UNAVAILABLE: "it is offline",
}
"""Flower's error codes and the words for them."""


class Outgoing(NamedTuple):
    """A message to a node.

    Args:
        key: identifies the reply.
        node: Flower's number of the node.
        kind: Flower's message type.
        blob: the content.
        timeout: seconds after which the reply is no longer useful.
    """

    key: Any
    node: int
    kind: str
    blob: bytes
    timeout: float = 0.0


class Incoming(NamedTuple):
    """A reply from a node.

    Args:
        key: the key of the message that this answers.
        facts: the JSON part of the reply.
        blob: the binary part.
        error: why there is no reply, in one line; None if there is one.
    """

    key: Any
    facts: dict[str, Any]
    blob: bytes
    error: str | None = None


class GridClient:
    """Sends messages to nodes, and returns the replies that have arrived.

    Args:
        grid: the grid of the running ServerApp.
        trusted: whether all nodes belong to us. Flower reads from a reply which message it answers. Replies of
            untrusted nodes are therefore pulled one at a time: a reply that cannot be read does not cost the replies
            of other nodes, and a node cannot answer in the name of another.
    """

    def __init__(self, grid: Grid, trusted: bool = True) -> None:
        self.grid = grid
        self._trusted = trusted
        self._pending: dict[str, Any] = {}
        self._undelivered: list[Any] = []

    def send(self, messages: Iterable[Outgoing]) -> None:
        """Send messages.

        Raises:
            FedeltaError: if Flower does not accept all of them.
        """
        outgoing = list(messages)
        if not outgoing:
            return
        grid_messages = [
            Message(
                # Flower identifies a message by a digest of its content. The random token makes it unguessable.
                RecordDict({"message": ConfigRecord({"blob": each.blob, "token": secrets.token_hex(16)})}),
                dst_node_id=each.node,
                message_type=each.kind,
                ttl=max(TTL_S, 2 * each.timeout),
            )
            for each in outgoing
        ]
        message_ids = list(self.grid.push_messages(grid_messages))
        if len(message_ids) < len(outgoing):
            raise FedeltaError(
                f"Flower took {len(message_ids)} of {len(outgoing)} messages; are they too large for it?"
            )
        for message_id, message in zip(message_ids, outgoing, strict=True):
            if message_id:
                self._pending[message_id] = message.key
            else:
                self._undelivered.append(message.key)

    def receive(self) -> Iterator[Incoming]:
        """Yield the replies that have arrived, in Flower's order."""
        while self._undelivered:
            yield Incoming(self._undelivered.pop(), {}, b"", "its node is gone")
        if not self._trusted:
            for message_id in list(self._pending):
                try:
                    replies = list(self.grid.pull_messages([message_id]))
                    incoming = [self._read(message_id, reply) for reply in replies[:1]]
                except httpx.HTTPError:
                    # The SuperLink failed, not the node.
                    raise
                except Exception as error:
                    reason = f"its reply can't be read: {one_line(error)}"
                    incoming = [Incoming(self._pending.pop(message_id), {}, b"", reason)]
                yield from incoming
        elif self._pending:
            for reply in self.grid.pull_messages(list(self._pending)):
                if reply.metadata.reply_to_message_id in self._pending:
                    yield self._read(reply.metadata.reply_to_message_id, reply)

    def _read(self, message_id: str, reply: Message) -> Incoming:
        if reply.metadata.reply_to_message_id != message_id:
            raise FedeltaError("it replies to another message")
        if reply.has_error():
            # The reason may come from the node, so only its code is used.
            reason = NODE_ERRORS.get(reply.error.code, f"Flower's error {int(reply.error.code)}")
            return Incoming(self._pending.pop(message_id), {}, b"", f"its node failed: {reason}")
        record = reply.content.config_records.get("message", {})
        blob = record.get("blob", b"")
        return Incoming(self._pending.pop(message_id), dict(record), blob if isinstance(blob, bytes) else b"")
