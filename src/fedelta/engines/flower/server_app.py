"""Flower's side of the server: a run whose rounds go over its grid."""

from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedelta.config import load_config
from fedelta.engines.flower.engine import FlowerEngine
from fedelta.engines.flower.events import EventFile
from fedelta.errors import in_one_line
from fedelta.runner import run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configuration that `flwr run` names."""
    settings = context.run_config
    events = EventFile(Path(str(settings["events"])))
    try:
        config = load_config(Path(str(settings["config"])))
        engine = partial(FlowerEngine, grid=grid, deadline=float(settings["deadline"]))
        run(config, resume=bool(settings["resume"]), observer=events, engine=engine)
        events.finished()
    except Exception as error:
        events.failed(in_one_line(error))
        raise
