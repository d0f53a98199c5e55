"""Flower's side of the server: a run whose rounds go over its grid."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedelta.config import load_config
from fedelta.engines.flower.engine import FlowerEngine
from fedelta.runner import run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configuration that `flwr run` names."""
    settings = context.run_config
    config = load_config(Path(str(settings["config"])))

    def over_grid(*arguments, clients, **_):  # type: ignore[no-untyped-def]
        return FlowerEngine(*arguments, grid=grid, clients=clients, deadline=float(settings["deadline"]))

    run(config, resume=bool(settings["resume"]), engine=over_grid)
