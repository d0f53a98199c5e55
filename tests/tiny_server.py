"""A server with one tiny layer, and handwritten updates."""

from typing import Any

import torch

from fedelta.federation.ranks import RankSettings
from fedelta.federation.server import Server, ServerState
from fedelta.federation.settings import FederationSettings
from fedelta.methods import make_method
from fedelta.protocol.messages import ClientUpdate

SHAPES = {"x": (5, 4)}
CLIENTS = ["a", "b", "c", "d"]


def make(
    method: str = "replication", ranks: dict[str, Any] | None = None, **settings: Any
) -> tuple[Server, ServerState]:
    """Create a server for four clients, with α = 8, and its state before round 0."""
    allocation = RankSettings(**(ranks or {"high": 2}))
    server = Server(make_method(method), FederationSettings(**settings), allocation, 8, "alpha/r", seed=0)
    return server, server.start(SHAPES, {"head": torch.zeros(3)}, CLIENTS, ["no", "yes"])


def reply(
    server: Server, state: ServerState, client: str, examples: int, value: float, **metrics: float
) -> ClientUpdate:
    """Write the update of a client that adds `value` to each entry of its factors and sets its head to `value`."""
    sent = server.broadcast(state, client)
    adapter = sent.adapter(SHAPES)
    return ClientUpdate(
        client=client,
        round=sent.round,
        rank=sent.rank,
        scale=sent.scale,
        version=sent.patch.end,
        digest=sent.patch.digests[sent.patch.end],
        examples=examples,
        factors={
            "A": {m: pair.A + value for m, pair in adapter.items()},
            "B": {m: pair.B + value for m, pair in adapter.items()},
        },
        heads={"head": torch.full((3,), value)},
        metrics=metrics,
    )
