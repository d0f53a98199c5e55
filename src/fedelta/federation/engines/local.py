"""The in-process engine: clients of a round shared out to workers, all on one base model.

Messages are serialized as on a wire, so that bytes are measured and a client sees what a real one would.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedelta.errors import in_one_line
from fedelta.federation.engines.rounds import Draw, Engine, EngineContext, explain, read_update
from fedelta.federation.engines.workers import Result
from fedelta.federation.reply import ClientReply
from fedelta.federation.server import ServerState
from fedelta.learning.device import DeviceError
from fedelta.learning.shards import Shard
from fedelta.learning.training.stopwatch import Stopwatch
from fedelta.protocol.messages import Broadcast, ClientUpdate
from fedelta.protocol.serialization import ByteCount, count_bytes


class LocalEngine(Engine):
    """Trains clients where the server is, on the server's own model.

    Args:
        shards: client → its rows.
        stack: clients that train in one pass.
    """

    def __init__(self, context: EngineContext, shards: Mapping[str, Shard], stack: int) -> None:
        super().__init__(context)
        self.shards = shards
        self.stack = stack
        self.workers = self.evaluator.workers
        self.caches = self.evaluator.caches
        self.told: set[str] = set()
        self._sent: dict[str, Broadcast] = {}

    def replies(self, state: ServerState, draw: Draw, watch: Stopwatch, inside: Stopwatch) -> Iterator[ClientReply]:
        clients = draw.clients
        for rank in sorted({state.ranks[client] for client in clients}):
            # Workers are forked from this process: what all of them need is made here, once.
            self.trainer.model.prepare(rank)
        if self.trainer.activation_cache:
            self.caches.fill([self.shards[client].train for client in clients])
            watch.lap("activations")
        stacks = [clients[begin : begin + self.stack] for begin in range(0, len(clients), self.stack)]
        costs = [sum(self.shards[client].cost for client in stack) for stack in stacks]
        results = self.workers.map(lambda i: self._train(state, stacks[i], draw.absent), costs)
        for stack, result in zip(stacks, results, strict=True):
            watch.lap("clients")
            inside.add(result.facts["seconds"], result.facts["counts"])
            if (reason := result.facts.get("alone")) and reason not in self.told:
                self.told.add(reason)
                self.observer.warn(f"round {state.round}: {len(stack)} clients one by one: {reason}")
            blobs = iter(result.blobs)
            for client, facts in zip(stack, result.facts["clients"], strict=True):
                # What a client has kept it keeps, whatever becomes of its update.
                blob, kept = (next(blobs), next(blobs)) if facts["answered"] else (b"", b"")
                self.trainer.take_kept(client, kept)
                update = read_update(client, facts, blob)
                up = count_bytes(blob) if isinstance(update, ClientUpdate) else ByteCount()
                sent = self._sent.pop(client) if client in self._sent else self.server.broadcast(state, client)
                yield ClientReply(sent, update, ByteCount(*facts["down"]), up)

    def _train(self, state: ServerState, clients: Sequence[str], absent: frozenset[str]) -> Result:
        """The part of some clients in a round, in whichever process: bytes of each update, and what it keeps."""
        watch = self.trainer.start_watch()
        facts: dict[str, Any] = {"clients": []}
        blobs: list[bytes] = []
        # In one process the reply below takes the same broadcast; a forked worker's stays with it.
        self._sent |= {client: self.server.broadcast(state, client) for client in clients}
        down = {client: self._sent[client].to_bytes() for client in clients}
        watch.lap("messages")
        together = self._together({c: down[c] for c in clients if c not in absent}, facts)
        for client in clients:
            mine: dict[str, Any] = {"down": count_bytes(down[client]), "answered": False}
            try:
                if client in absent:
                    raise TimeoutError("dropped out")
                update = together.get(client) or self.trainer.reply(down[client], self.shards[client])
                blobs += [update, self.trainer.kept_bytes(client)]
                mine["answered"] = True
            except DeviceError:
                # All clients train on this device, and the next one would not fare better.
                raise
            except Exception as error:
                mine |= explain(error)
            facts["clients"].append(mine)
        facts["seconds"], facts["counts"] = dict(watch.seconds), dict(watch.counts)
        return Result(facts, blobs)

    def _together(self, blobs: Mapping[str, bytes], facts: dict[str, Any]) -> Mapping[str, bytes]:
        """Updates of those that can train in one pass."""
        if len(blobs) < 2:
            return {}
        kept = dict(self.trainer.kept)
        try:
            updates = self.trainer.reply_together(list(blobs.values()), [self.shards[client] for client in blobs])
        except Exception as error:
            # One of them failed, and alone it will be seen which. The others start where they started.
            self.trainer.kept = kept
            self.trainer.watch.counts.clear()
            facts["alone"] = in_one_line(error)
            return {}
        if updates is None:
            facts["alone"] = "they can't be stacked"
            return {}
        return dict(zip(blobs, updates, strict=True))
