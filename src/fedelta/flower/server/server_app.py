"""Flower's side of the server: a run whose rounds go over its grid."""

import json
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedelta.errors import TooFewUpdates, in_one_line
from fedelta.federation.checkpoint import load_checkpoint
from fedelta.federation.engines.process_lifetime import end_with_holder
from fedelta.federation.run_folder import RunFolder
from fedelta.flower.agreement import comparable
from fedelta.flower.server.engine import FlowerEngine, check
from fedelta.flower.server.grid_client import GridClient
from fedelta.flower.server.node_registry import NodeRegistry
from fedelta.flower.server.progress_file import ProgressWriter
from fedelta.learning.shards import read_splits
from fedelta.runs.config import Config, load_config
from fedelta.runs.runner import MakeEngine, run

COME_BACK_S = 60.0
"""How long a run that goes on waits for all of its sites before it does so with those that are there."""
FAREWELL_S = 60.0

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the plan says: `config`, `events`, `resume`, `clients`, and of sites with rows of their own `sites`."""
    plan = json.loads(Path(str(context.run_config["plan"])).read_text())
    end_with_holder(Path(plan["hold"]))
    events = ProgressWriter(Path(plan["events"]))
    try:
        config = load_config(Path(plan["config"]))
        check(config)
        if plan.get("sites"):
            _run_with_sites(config, grid, plan, events)
        else:
            nodes = NodeRegistry(GridClient(grid), plan["clients"], None, {}, events.warn)
            nodes.wait(nodes.clients, len(nodes.clients), plan["patience"])
            run(config, resume=plan["resume"], observer=events, engine=over(nodes))
        events.finished()
    except Exception as error:
        events.failed(in_one_line(error))
        raise


def _run_with_sites(config: Config, grid: Grid, plan: dict[str, Any], events: ProgressWriter) -> None:
    names = None if plan["numbers"] is None else {int(node): name for node, name in plan["numbers"].items()}
    question = {"settings": comparable(config), "classes": read_splits(config.data, config.task)[1], "run": plan["run"]}
    checkpoint = RunFolder(config.folder, {}).checkpoint_file
    begun = load_checkpoint(checkpoint).state.ranks if plan["resume"] and checkpoint.exists() else None
    clients = sorted(begun or plan["clients"])
    nodes = NodeRegistry(GridClient(grid, believed=False), clients, names, question, events.warn, config.ranks.largest)
    nodes.ranks = dict(begun or {})
    events.say(f"waiting for {', '.join(clients)}")
    try:
        nodes.wait(clients, len(clients), plan["patience"] if begun is None else min(plan["patience"], COME_BACK_S))
    except TooFewUpdates as error:
        # A run that has begun goes on without those that do not come back.
        if begun is None:
            raise
        events.warn(str(error))
    ranks = begun or {client: nodes.capabilities[client].rank or 0 for client in clients}
    told = tuple(ranks[client] for client in clients)
    theirs = {"allocation": "fixed", "per_client": told, "low": min(told), "high": config.ranks.largest}
    rows = {client: nodes.capabilities[client].rows or 0 for client in clients if client in nodes.capabilities}
    run(
        config.model_copy(update={"ranks": config.ranks.model_copy(update=theirs)}),
        resume=plan["resume"],
        observer=events,
        engine=over(nodes),
        sites={client: rows.get(client, 0) for client in clients},
    )
    nodes.dismiss(min(config.federation.deadline, FAREWELL_S))


def over(nodes: NodeRegistry) -> MakeEngine:
    """Makes the engine of a run whose clients are these nodes, with rows of their own."""
    return lambda context, shards, stack: FlowerEngine(context, nodes)  # noqa: ARG005
