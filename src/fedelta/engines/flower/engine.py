"""The rounds of a run over Flower's grid: one message a client and round."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedelta.engines.rounds import Answer, Engine, read_update
from fedelta.errors import ClientFailed, FedeltaError
from fedelta.messages import ClientUpdate
from fedelta.packing import ByteCount, count_bytes
from fedelta.server import ServerState
from fedelta.stopwatch import Stopwatch

POLL_S = 0.05


class FlowerEngine(Engine):
    """Clients are where their nodes are.

    Args:
        grid: of the running ServerApp.
        clients: names that must be served by some node before the first round.
        deadline: seconds after which a round goes on without those who have not answered.
    """

    def __init__(self, *arguments: Any, grid: Grid, clients: Sequence[str], deadline: float, **_: Any) -> None:
        super().__init__(*arguments)
        if self.server.method.personal:
            raise FedeltaError(f"method {self.server.method.name} keeps factors at its clients: not over Flower yet")
        if self.trainer.settings.stack != 1:
            raise FedeltaError(f"training.stack is {self.trainer.settings.stack}, but over Flower it is 1")
        self.grid = grid
        self.deadline = deadline
        self.nodes = self._find(set(clients))

    def _find(self, wanted: set[str]) -> dict[str, int]:
        """Client → node, by asking every node once, until all clients are there or the deadline is over."""
        found: dict[str, int] = {}
        asked: set[int] = set()
        until = time.monotonic() + self.deadline
        while not wanted <= found.keys():
            new = [node for node in self.grid.get_node_ids() if node not in asked]
            questions = [Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY) for node in new]
            for node, reply in self._replies(dict(zip(new, questions, strict=True)), until):
                if reply is not None:
                    asked.add(node)
                    # The first that names a client has it; nobody takes it over in the middle of a run.
                    names = reply.get("clients")
                    here = {str(name) for name in names} if isinstance(names, list) else set()
                    found |= dict.fromkeys((wanted & here) - found.keys(), node)
            if time.monotonic() > until:
                raise FedeltaError(f"no node serves client {sorted(wanted - found.keys())[0]}")
            time.sleep(POLL_S)
        return found

    def _replies(self, messages: Mapping[Any, Message], until: float) -> Iterator[tuple[Any, ConfigRecord | None]]:
        """Replies as they come, None for a node that failed; those that are late are left out."""
        pushed = list(self.grid.push_messages(messages.values())) if messages else []
        if len(pushed) < len(messages):
            raise FedeltaError(f"Flower took {len(pushed)} of {len(messages)} messages; are they too large for it?")
        sent = list(zip(pushed, messages, strict=True))
        ids = {number: key for number, key in sent if number}
        # No number for a message: its node is gone.
        yield from ((key, None) for number, key in sent if not number)
        while ids and time.monotonic() < until:
            for reply in self.grid.pull_messages(list(ids)):
                key = ids.pop(reply.metadata.reply_to_message_id)
                yield key, None if reply.has_error() else reply.content.config_records.get("message")
            time.sleep(POLL_S if ids else 0)

    def answers(
        self,
        state: ServerState,
        clients: Sequence[str],
        watch: Stopwatch,
        inside: Stopwatch,  # noqa: ARG002
    ) -> Iterator[Answer]:
        sent = {client: self.server.broadcast(state, client) for client in clients}
        blobs = {client: broadcast.to_bytes() for client, broadcast in sent.items()}
        present = [client for client in clients if not self.server.drops_out(state, client)]
        watch.lap("messages")
        arrived: dict[str, ConfigRecord | None] = {}
        until = time.monotonic() + self.deadline
        asked = present
        while asked:
            behind: dict[str, int] = {}
            for client, record in self._replies({c: self._message(c, blobs[c]) for c in asked}, until):
                version = record.get("behind") if record else None
                if isinstance(version, int) and 0 <= version < state.log.version:
                    behind[client] = version
                else:
                    arrived[client] = record
            for client, version in behind.items():
                # A trainer that came back blank, perhaps more than once, gets every patch again.
                blobs[client] = self.server.broadcast(state, client, since=version).to_bytes()
            asked = list(behind)
        watch.lap("clients")
        for client in clients:
            update = self._update(client, arrived, dropped=client not in present)
            record = arrived.get(client)
            up = count_bytes(record["blob"]) if record and isinstance(update, ClientUpdate) else ByteCount()
            yield Answer(client, sent[client], update, count_bytes(blobs[client]), up)

    def _message(self, client: str, blob: bytes) -> Message:
        content = RecordDict({"message": ConfigRecord({"blob": blob})})
        return Message(content, dst_node_id=self.nodes[client], message_type=MessageType.TRAIN)

    def _update(
        self, client: str, arrived: Mapping[str, ConfigRecord | None], dropped: bool
    ) -> ClientUpdate | Exception:
        if dropped:
            return ClientFailed(client, "TimeoutError: dropped out")
        if client not in arrived:
            return ClientFailed(client, f"TimeoutError: no reply within {self.deadline:.0f} s")
        record = arrived[client]
        if record is None:
            return ClientFailed(client, "its node failed")
        blob = record.get("blob", b"")
        return read_update(client, record, blob if isinstance(blob, bytes) else b"")
