"""What a grid tells about its progress. The base class ignores all of it."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedelta.runs.config import Config


class SweepObserver:
    """Called as a grid goes on; subclasses show it to people."""

    def planned(self, what: str, cells: Mapping[str, Config], left: Collection[str], running: Path) -> None:
        """A part of the grid begins.

        Args:
            what: it is.
            cells: key → configuration, of all its cells.
            left: keys of those that have not been run.
            running: the folder of those that are under way, by key.
        """

    def cell_done(self, key: str, name: str, row: Mapping[str, Any]) -> None:
        """A cell is run and its row is written; the name says in words which it is."""

    def say(self, message: str) -> None:
        """Something that is good to know."""
