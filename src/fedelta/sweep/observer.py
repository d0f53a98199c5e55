"""Events of a running grid."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedelta.runs.config import Config


class SweepObserver:
    """Receives the events of a running grid and ignores them; subclasses display them."""

    def planned(self, what: str, cells: Mapping[str, Config], left: Collection[str], running: Path) -> None:
        """A part of the grid begins.

        Args:
            what: name of the part.
            cells: key → configuration of all its cells.
            left: keys of the cells that have not run.
            running: folder that holds, by key, the run folders of the cells that are running.
        """

    def cell_done(self, key: str, name: str, row: Mapping[str, Any]) -> None:
        """A cell has run and its row is written.

        Args:
            key: key of the cell.
            name: the cell in words.
            row: its row in the Parquet file.
        """

    def say(self, message: str) -> None:
        """Show a message."""
