"""The end of a run for its sites: each is told, and receives the final adapter."""

import json
import time
from pathlib import Path
from typing import NamedTuple

from flwr.app import MessageType

from fedelta.flower.server.grid_client import Outgoing
from fedelta.flower.server.node_registry import POLL_S, NodeRegistry
from fedelta.lora.files.adapter_config import CONFIG
from fedelta.lora.files.locate import WEIGHTS
from fedelta.protocol.failures import FAILURE
from fedelta.protocol.farewell import Farewell

MAX_ADAPTER = 2**30
"""Maximum size in bytes of an adapter that is sent. A larger one has to be copied."""
AWAY_S = 10.0
"""Seconds to wait for sites that are away."""


class FarewellKey(NamedTuple):
    """Key of the query that tells a node that the run has ended."""

    node: int


def read_farewell(adapter: Path, rounds: int) -> Farewell:
    """Return the last message to the sites of a run.

    Args:
        adapter: PEFT folder of the final adapter.
        rounds: number of finished rounds.
    """
    weights, config = adapter / WEIGHTS, adapter / CONFIG
    if weights.stat().st_size > MAX_ADAPTER:
        return Farewell(rounds)
    # The path of the server's model means nothing at a site.
    known = {**json.loads(config.read_text()), "base_model_name_or_path": None}
    return Farewell(rounds, known, weights.read_bytes())


def dismiss(nodes: NodeRegistry, farewell: Farewell, timeout: float) -> list[str]:
    """Send the last message to each node that is online, and to those that come back in time.

    Args:
        nodes: the nodes of the federation.
        farewell: the message.
        timeout: seconds to wait for nodes that are still working on a round that finished without them.

    Returns:
        The clients whose sites have not confirmed it.
    """
    blob, start = farewell.to_bytes(), time.monotonic()
    waiting: set[int] = set()
    done: set[int] = set()
    untold = set(nodes.clients)
    while untold and time.monotonic() - start < timeout:
        online = nodes.list_online()
        new = sorted(online - waiting - done)
        nodes.grid_client.send(Outgoing(FarewellKey(node), node, MessageType.QUERY, blob) for node in new)
        waiting |= set(new)
        for reply in nodes.grid_client.receive():
            if isinstance(reply.key, FarewellKey):
                waiting.discard(reply.key.node)
                if reply.error is None and FAILURE not in reply.facts:
                    done.add(reply.key.node)
                    untold -= set(nodes.clients_of(reply.key.node, reply.facts))
        if not waiting & online and time.monotonic() - start > AWAY_S:
            break
        time.sleep(POLL_S)
    return sorted(untold)
