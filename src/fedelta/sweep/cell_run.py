"""One cell of a grid, run to its end in any process."""

from collections.abc import Mapping

from fedelta.errors import Diverged, TooFewUpdates
from fedelta.federation.engines import Observer
from fedelta.federation.engines.workers import Result
from fedelta.runs.config import Config
from fedelta.runs.identity import identify
from fedelta.runs.runner import run
from fedelta.sweep.results import row_of


class _Warnings(Observer):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def warn(self, message: str) -> None:
        self.messages.append(message)


def run_cell(key: str, config: Config, made_with: Mapping[str, str], accept_changed_data: bool = False) -> Result:
    """Run a cell to its end, in any process; an interrupted cell resumes."""
    warnings = _Warnings()
    try:
        finished = run(config, resume=True, observer=warnings, accept_changed_data=accept_changed_data)
        row = row_of(key, config, made_with, finished)
    except Diverged as error:
        row = row_of(key, config, made_with, None, str(error), identify(config))
    except TooFewUpdates as error:
        # Divergence is a result of these settings. Any other failure needs attention and ends the grid.
        if not error.diverged:
            raise
        row = row_of(key, config, made_with, None, str(error), identify(config))
    return Result({"row": row, "warnings": warnings.messages})
