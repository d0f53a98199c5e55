"""The ServerApp that Flower runs: a run whose rounds are exchanged over Flower's grid."""

import json
from collections import ChainMap
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedelta.errors import TooFewUpdates, in_one_line, listed
from fedelta.federation.engines.process_lifetime import end_with_holder
from fedelta.federation.engines.rounds import EngineContext
from fedelta.federation.run_folder import RunFolder
from fedelta.flower.agreement import shared_settings
from fedelta.flower.server.engine import FlowerEngine, check_config
from fedelta.flower.server.farewell import AWAY_S, dismiss, read_farewell
from fedelta.flower.server.grid_client import GridClient
from fedelta.flower.server.node_registry import NodeRegistry, dominant_site
from fedelta.flower.server.progress_file import ProgressWriter
from fedelta.flower.server.site_list import read_site_list
from fedelta.learning.shards import Shard, read_splits
from fedelta.runs.config import Config, load_config
from fedelta.runs.runner import MakeEngine, run

REJOIN_S = 60.0
"""Seconds that a resumed run waits for all of its sites, before it continues with the sites that are online."""
DISMISS_S = 60.0
"""Maximum seconds to wait until all nodes know that the run has ended."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Execute the plan, a JSON file that `SuperLink.submit` wrote.

    It holds `config`, `events`, `hold`, `resume`, `accept_changed_data`, `clients` and `patience`; if the sites have
    their own rows, also `sites`, `run` and `numbers`, the file of a `SiteList`.
    """
    plan = json.loads(Path(str(context.run_config["plan"])).read_text())
    end_with_holder(Path(plan["hold"]))
    events = ProgressWriter(Path(plan["events"]))
    try:
        config = load_config(Path(plan["config"]))
        check_config(config)
        if plan.get("sites"):
            _run_with_sites(config, grid, plan, events)
        else:
            nodes = NodeRegistry(GridClient(grid), plan["clients"], None, {}, events.warn)
            nodes.wait(nodes.clients, len(nodes.clients), plan["patience"])
            run(
                config,
                resume=plan["resume"],
                observer=events,
                engine=engine_factory(nodes),
                accept_changed_data=plan["accept_changed_data"],
            )
        events.finished()
    except Exception as error:
        events.failed(in_one_line(error))
        raise


def _run_with_sites(config: Config, grid: Grid, plan: dict[str, Any], events: ProgressWriter) -> None:
    follow = None if plan["numbers"] is None else partial(read_site_list, Path(plan["numbers"]))
    registered = follow() if follow else None
    classes = read_splits(config.data, config.task)[1]
    question = {"settings": shared_settings(config), "classes": classes, "run": plan["run"]}
    checkpoint = RunFolder(config.folder, {}).saved(events.warn) if plan["resume"] else None
    saved_ranks = None if checkpoint is None else checkpoint.state.ranks
    clients = sorted(saved_ranks or plan["clients"])
    grid_client = GridClient(grid, trusted=False)
    nodes = NodeRegistry(grid_client, clients, registered, question, events.warn, config.ranks.largest, follow)
    nodes.ranks = dict(saved_ranks or {})
    events.say(f"waiting for {listed(clients, 20)}")
    try:
        timeout = plan["patience"] if saved_ranks is None else min(plan["patience"], REJOIN_S)
        expected = [client for client in clients if nodes.admits(client)]
        nodes.wait(expected, len(expected), timeout)
    except TooFewUpdates as error:
        # A resumed run continues without the sites that are missing.
        if saved_ranks is None:
            raise
        events.warn(str(error))
    if checkpoint is None:
        per_client = tuple(nodes.capabilities[client].rank or 0 for client in clients)
    else:
        # Those of the first round: sites that joined, left or pruned since are in the state, not in the configuration.
        per_client = tuple(checkpoint.config["ranks"]["per_client"])
    changes = {"allocation": "fixed", "per_client": per_client, "low": min(per_client), "high": config.ranks.largest}
    if config.federation.weighting == "examples" and (line := dominant_site(nodes.rows)) is not None:
        events.warn(line)
    finished = run(
        config.model_copy(update={"ranks": config.ranks.model_copy(update=changes)}),
        resume=plan["resume"],
        observer=events,
        engine=engine_factory(nodes),
        sites=ChainMap(nodes.rows, dict.fromkeys(clients, 0)),
        accept_changed_data=plan["accept_changed_data"],
    )
    events.say("the run has ended; its adapter goes to the sites")
    farewell = read_farewell(finished.adapter, finished.result["rounds"])
    if missing := dismiss(nodes, farewell, max(AWAY_S, min(config.federation.deadline, DISMISS_S))):
        events.warn(f"not told that the run has ended: {listed(missing)}; give them {finished.adapter}")


def engine_factory(nodes: NodeRegistry) -> MakeEngine:
    """Return a function that makes the engine of a run whose clients train on these nodes."""

    def make(context: EngineContext, shards: Mapping[str, Shard], stack: int) -> FlowerEngine:  # noqa: ARG001
        return FlowerEngine(context, nodes, {client: shard.train.row_count for client, shard in shards.items()})

    return make
