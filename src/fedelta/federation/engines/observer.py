"""Callbacks for the progress of a run. The base class ignores all of them."""

from collections.abc import Mapping
from typing import Any


class Observer:
    """Receives the progress of a run from its engine. Subclasses display it."""

    def run_started(self, title: str, done: int, rounds: int) -> None:
        """A run starts or resumes.

        Args:
            title: short description of the run, such as its method and seed.
            done: number of rounds that were finished before.
            rounds: number of rounds of the whole run.
        """

    def clients_started(self, round: int, clients: int) -> None:
        """A round starts with this number of clients."""

    def client_done(self, client: str) -> None:
        """A client has replied or failed."""

    def evaluation_started(self, split: str, texts: int) -> None:
        """An evaluation starts.

        Args:
            split: name of the split, or of the client whose model is evaluated.
            texts: number of texts to evaluate.
        """

    def evaluation_advanced(self, texts: int) -> None:
        """This number of further texts is evaluated."""

    def round_done(self, record: Mapping[str, Any]) -> None:
        """A round is finished and saved.

        Args:
            record: its line of `rounds.jsonl`.
        """

    def say(self, message: str) -> None:
        """Show an informative message."""

    def warn(self, message: str) -> None:
        """Show a warning about a problem that does not stop the run."""
