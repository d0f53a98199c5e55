"""The in-process engine: the clients of a round train in workers, all on one base model.

Messages are serialized as they are over a network. Bytes are therefore measured, and a simulated client reads exactly
what a remote client would receive.
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
    """Trains the clients in the server's process or in its workers, on the server's own model.

    Args:
        context: the parts that every engine works with.
        shards: client → its rows.
        stack: number of clients that train in one pass.
    """

    def __init__(self, context: EngineContext, shards: Mapping[str, Shard], stack: int) -> None:
        super().__init__(context)
        self.shards = shards
        self.stack = stack
        self.workers = self.evaluator.workers
        self.caches = self.evaluator.caches
        self._warned: set[str] = set()
        self._sent: dict[str, Broadcast] = {}

    def replies(self, state: ServerState, draw: Draw, watch: Stopwatch, inside: Stopwatch) -> Iterator[ClientReply]:
        clients = draw.clients
        for rank in sorted({state.ranks[client] for client in clients}):
            # Workers are forked from this process. Prepare here, once, what all of them need.
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
            if (reason := result.facts.get("unstacked")) and reason not in self._warned:
                self._warned.add(reason)
                self.observer.warn(f"round {state.round}: training {len(stack)} clients one by one: {reason}")
            blobs = iter(result.blobs)
            for client, facts in zip(stack, result.facts["clients"], strict=True):
                # A client keeps its factors even if its update is refused.
                blob, kept = (next(blobs), next(blobs)) if facts["replied"] else (b"", b"")
                self.trainer.take_kept(client, kept)
                update = read_update(client, facts, blob)
                up = count_bytes(blob) if isinstance(update, ClientUpdate) else ByteCount()
                sent = self._sent.pop(client) if client in self._sent else self.server.broadcast(state, client)
                rows = self.shards[client].train.row_count
                yield ClientReply(sent, update, ByteCount(*facts["down"]), up, rows=rows)

    def _train(self, state: ServerState, clients: Sequence[str], absent: frozenset[str]) -> Result:
        """Train one stack of clients, in this process or in a worker.

        Returns:
            Facts about each client, and for each client that replied two blobs: its update and what it keeps.
        """
        watch = self.trainer.start_watch()
        facts: dict[str, Any] = {"clients": []}
        blobs: list[bytes] = []
        # Without workers, `replies` takes these broadcasts again. In a forked worker, they end with the worker.
        self._sent |= {client: self.server.broadcast(state, client) for client in clients}
        down = {client: self._sent[client].to_bytes() for client in clients}
        watch.lap("messages")
        together = self._together({c: down[c] for c in clients if c not in absent}, facts)
        for client in clients:
            client_facts: dict[str, Any] = {"down": count_bytes(down[client]), "replied": False}
            try:
                if client in absent:
                    raise TimeoutError("dropped out")
                update = together.get(client) or self.trainer.reply(down[client], self.shards[client])
                blobs += [update, self.trainer.kept_bytes(client)]
                client_facts["replied"] = True
            except DeviceError:
                # All clients train on this device, so the next one would fail too.
                raise
            except Exception as error:
                client_facts |= explain(error)
            facts["clients"].append(client_facts)
        facts["seconds"], facts["counts"] = dict(watch.seconds), dict(watch.counts)
        return Result(facts, blobs)

    def _together(self, blobs: Mapping[str, bytes], facts: dict[str, Any]) -> Mapping[str, bytes]:
        """Train clients in one pass; if that is not possible, return no updates and give the reason in `facts`."""
        if len(blobs) < 2:
            return {}
        kept = dict(self.trainer.kept)
        try:
            updates = self.trainer.reply_together(list(blobs.values()), [self.shards[client] for client in blobs])
        except Exception as error:
            # One of the clients failed. Training them one by one shows which. All of them start from the same state
            # again.
            self.trainer.kept = kept
            self.trainer.watch.counts.clear()
            facts["unstacked"] = in_one_line(error)
            return {}
        if updates is None:
            facts["unstacked"] = "they can't be stacked"
            return {}
        return dict(zip(blobs, updates, strict=True))
