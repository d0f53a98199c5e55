"""Messages over Flower's grid and their replies, each known by a key of ours, whenever it comes."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedelta.errors import FedeltaError


class Letter(NamedTuple):
    """A message to a node.

    Args:
        key: by which its reply will be known.
        node: Flower's number of it.
        kind: Flower's type of message.
        blob: its content.
    """

    key: Any
    node: int
    kind: str
    blob: bytes


class Received(NamedTuple):
    """A reply: its facts and blob, or in one line why there is none."""

    key: Any
    facts: dict[str, Any]
    blob: bytes
    error: str | None = None


class Mail:
    """Sends, and gives what has come since.

    Args:
        grid: of the running ServerApp.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._open: dict[str, Any] = {}
        self._lost: list[Any] = []

    def send(self, letters: Iterable[Letter]) -> None:
        """Hand over messages.

        Raises:
            FedeltaError: if Flower does not take them.
        """
        letters = list(letters)
        if not letters:
            return
        messages = [
            Message(
                RecordDict({"message": ConfigRecord({"blob": each.blob})}),
                dst_node_id=each.node,
                message_type=each.kind,
            )
            for each in letters
        ]
        numbers = list(self.grid.push_messages(messages))
        if len(numbers) < len(letters):
            raise FedeltaError(f"Flower took {len(numbers)} of {len(letters)} messages; are they too large for it?")
        for number, letter in zip(numbers, letters, strict=True):
            if number:
                self._open[number] = letter.key
            else:
                self._lost.append(letter.key)

    def receive(self) -> Iterator[Received]:
        """What has come, in the order in which Flower has it."""
        while self._lost:
            yield Received(self._lost.pop(), {}, b"", "its node is gone")
        if not self._open:
            return
        for reply in self.grid.pull_messages(list(self._open)):
            key = self._open.pop(reply.metadata.reply_to_message_id, None)
            if key is None:
                continue
            if reply.has_error():
                yield Received(key, {}, b"", f"its node failed: {reply.error.reason}")
                continue
            record = reply.content.config_records.get("message", {})
            blob = record.get("blob", b"")
            yield Received(key, dict(record), blob if isinstance(blob, bytes) else b"")
