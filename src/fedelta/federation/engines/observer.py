"""What an engine tells about its progress. The base class ignores all of it."""

from collections.abc import Mapping
from typing import Any


class Observer:
    """Called by an engine as a run goes on; subclasses show it to people."""

    def run_started(self, title: str, done: int, rounds: int) -> None:
        """A run begins, `done` of its rounds finished before."""

    def clients_started(self, round: int, clients: int) -> None:
        """A round begins with so many clients."""

    def client_done(self, client: str) -> None:
        """A client has answered, or failed."""

    def evaluation_started(self, split: str, texts: int) -> None:
        """The server evaluates the global model on so many texts."""

    def evaluation_advanced(self, texts: int) -> None:
        """So many texts more are done."""

    def round_done(self, record: Mapping[str, Any]) -> None:
        """A round is finished and saved; the record is its line of `rounds.jsonl`."""

    def say(self, message: str) -> None:
        """Something that is good to know."""

    def warn(self, message: str) -> None:
        """Something went wrong that does not stop the run."""
