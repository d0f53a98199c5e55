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
                    found |= dict.fromkeys((str(name) for name in reply["clients"]), node)
            if time.monotonic() > until:
                raise FedeltaError(f"no node serves client {sorted(wanted - found.keys())[0]}")
            time.sleep(POLL_S)
        return found

    def _replies(self, messages: Mapping[Any, Message], until: float) -> Iterator[tuple[Any, ConfigRecord | None]]:
        """Replies as they come, None for a node that failed; those that are late are left out."""
        ids = dict(zip(self.grid.push_messages(messages.values()), messages, strict=True)) if messages else {}
        while ids and time.monotonic() < until:
            for reply in self.grid.pull_messages(list(ids)):
                key = ids.pop(reply.metadata.reply_to_message_id)
                yield key, None if reply.has_error() else reply.content.config_records["message"]
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
        behind: dict[str, int] = {}
        for client, record in self._replies({c: self._message(c, blobs[c]) for c in present}, until):
            arrived[client] = record
            if record is not None and "behind" in record:
                behind[client] = int(record["behind"])
        for client, version in behind.items():
            # A node that came back blank gets every patch again.
            blank = self.server.broadcast(state, client, since=version)
            blobs[client] = blank.to_bytes()
        again = {client: self._message(client, blobs[client]) for client in behind}
        arrived |= dict(self._replies(again, until))
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
