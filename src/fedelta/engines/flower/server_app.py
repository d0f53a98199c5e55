"""Flower's side of the server: a run whose rounds go over its grid."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedelta.config import Config, load_config
from fedelta.data import label_classes
from fedelta.engines.flower.engine import FlowerEngine, check
from fedelta.engines.flower.events import EventFile
from fedelta.engines.flower.mail import Mail
from fedelta.engines.flower.nodes import Nodes
from fedelta.engines.flower.site import comparable
from fedelta.engines.lifetime import end_with_holder
from fedelta.errors import FedeltaError, in_one_line
from fedelta.runner import run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the plan says: `config`, `events`, `resume`, `clients`, and of sites with rows of their own `sites`."""
    plan = json.loads(Path(str(context.run_config["plan"])).read_text())
    end_with_holder(Path(plan["hold"]))
    events = EventFile(Path(plan["events"]))
    try:
        config = load_config(Path(plan["config"]))
        check(config)
        if plan.get("sites"):
            _run_with_sites(config, grid, plan, events)
        else:
            nodes = Nodes(Mail(grid), plan["clients"], None, {}, events.warn)
            nodes.wait(nodes.clients, len(nodes.clients), plan["patience"])
            run(config, resume=plan["resume"], observer=events, engine=partial(FlowerEngine, nodes=nodes))
        events.finished()
    except Exception as error:
        events.failed(in_one_line(error))
        raise


def _run_with_sites(config: Config, grid: Grid, plan: dict[str, Any], events: EventFile) -> None:
    names = None if plan["numbers"] is None else {int(node): name for node, name in plan["numbers"].items()}
    question = {"settings": comparable(config), "classes": label_classes(config.data)[2], "run": plan["run"]}
    nodes = Nodes(Mail(grid), plan["clients"], names, question, events.warn)
    events.say(f"waiting for {', '.join(nodes.clients)}")
    nodes.wait(nodes.clients, len(nodes.clients), plan["patience"])
    found = {client: nodes.capabilities[client] for client in sorted(nodes.clients)}
    ranks = tuple(each.rank or 0 for each in found.values())
    if 0 in ranks:
        raise FedeltaError(f"client {list(found)[ranks.index(0)]} says no rank")
    theirs = {"allocation": "fixed", "per_client": ranks, "low": min(ranks), "high": max(ranks)}
    config = config.model_copy(update={"ranks": config.ranks.model_copy(update=theirs)})
    run(
        config,
        resume=plan["resume"],
        observer=events,
        engine=partial(FlowerEngine, nodes=nodes),
        sites={client: each.rows or 0 for client, each in found.items()},
    )
    nodes.dismiss()
