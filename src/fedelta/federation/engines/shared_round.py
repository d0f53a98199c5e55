"""Engine of a comparison: in round 0, methods that send the clients the same share one training of them.

All methods of a comparison start from the same initial adapter, and most send it as it is. Then the clients' updates of
round 0 are equal, and only their aggregation differs. The files of a run are the same with or without this, except for
the seconds in `timings.jsonl`.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

from fedelta.federation.engines.local import LocalEngine
from fedelta.federation.engines.rounds import Draw, EngineContext
from fedelta.federation.reply import ClientReply
from fedelta.federation.server import ServerState
from fedelta.learning.shards import Shard
from fedelta.learning.training.stopwatch import Stopwatch
from fedelta.methods import Method
from fedelta.protocol.compression import LOSSLESS
from fedelta.protocol.messages import ClientUpdate
from fedelta.protocol.serialization import count_bytes

MAX_BYTES = 2_000_000_000
"""Updates of a round that take more memory are not kept."""


class SharedRound:
    """Updates of round 0 of the last run whose updates could be kept.

    Attributes:
        key: digest of everything that decides the updates; empty before the first run.
        updates: client → its serialized update, in the order of the round.
    """

    def __init__(self) -> None:
        self.key = ""
        self.updates: dict[str, bytes] = {}


class SharingEngine(LocalEngine):
    """A local engine that takes the updates of round 0 from an earlier run where they would be equal.

    Args:
        context, shards, stack: as for `LocalEngine`.
        shared: updates to share between the runs of a comparison, which have the same data, model and settings.
    """

    def __init__(self, context: EngineContext, shards: Mapping[str, Shard], stack: int, shared: SharedRound) -> None:
        super().__init__(context, shards, stack)
        self.shared = shared

    def replies(self, state: ServerState, draw: Draw, watch: Stopwatch, inside: Stopwatch) -> Iterator[ClientReply]:
        if state.round > 0 or draw.absent or not self._is_plain(state):
            yield from super().replies(state, draw, watch, inside)
            return
        key = self._key(state, draw)
        if key == self.shared.key:
            for client, blob in self.shared.updates.items():
                sent = self.server.broadcast(state, client)
                update, rows = ClientUpdate.from_bytes(blob, client), self.shards[client].train.row_count
                yield ClientReply(sent, update, count_bytes(sent.to_bytes()), count_bytes(blob), rows=rows)
            return
        self.shared.key, self.shared.updates, size = "", {}, 0
        updates: dict[str, bytes] = {}
        for reply in super().replies(state, draw, watch, inside):
            if isinstance(reply.update, ClientUpdate) and size <= MAX_BYTES:
                updates[reply.client] = reply.update.to_bytes()
                size += len(updates[reply.client])
            yield reply
        if list(updates) == list(draw.clients) and size <= MAX_BYTES:
            self.shared.key, self.shared.updates = key, updates

    def _is_plain(self, state: ServerState) -> bool:
        """True if clients do nothing but train the factors that they receive, and keep nothing."""
        method, kind = self.server.method, type(self.server.method)
        own_steps = kind.penalty is not Method.penalty or kind.finish is not Method.finish
        plan = method.factors(state.round)
        # `fed-sb` trains a core, which a start of A and B does not hold.
        whole = not plan.keep and "core" not in plan.train | plan.up
        return whole and not own_steps and self.server.settings.precision == LOSSLESS

    def _key(self, state: ServerState, draw: Draw) -> str:
        digest = hashlib.sha256(str((self.trainer.seed, self.stack, draw.attempt)).encode())
        for client in draw.clients:
            sent = self.server.broadcast(state, client)
            # A factor that is drawn from the seed is as good as one that is sent.
            start = sent.adapter(state.log.shapes)
            factors = {name: {module: getattr(pair, name) for module, pair in start.items()} for name in "AB"}
            plan = sent.plan._replace(down=frozenset("AB"))
            digest.update(replace(sent, factors=factors, plan=plan, method={"name": "", "options": {}}).to_bytes())
        return digest.hexdigest()
