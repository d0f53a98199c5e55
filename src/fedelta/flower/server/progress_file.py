"""Progress of a run, passed from the server's process to the user's as a file of JSON lines."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedelta.federation.engines.observer import Observer

FAILED, FINISHED = "failed", "finished"


def _lock_file(path: Path) -> Path:
    return path.with_suffix(".lock")


class ProgressWriter(Observer):
    """An observer that writes each call as a line of a file.

    While this process lives, it holds a lock beside the file.

    Args:
        path: the file. An existing one is overwritten.
    """

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(_lock_file(path))
        self._lock.acquire(timeout=0)
        path.write_text("")
        self._stream = path.open("a", buffering=1)

    def _write(self, name: str, *arguments: Any) -> None:
        self._stream.write(json.dumps([name, *arguments]) + "\n")

    def run_started(self, title: str, done: int, rounds: int) -> None:
        self._write("run_started", title, done, rounds)

    def clients_started(self, round: int, clients: int) -> None:
        self._write("clients_started", round, clients)

    def client_done(self, client: str) -> None:
        self._write("client_done", client)

    def evaluation_started(self, split: str, texts: int) -> None:
        self._write("evaluation_started", split, texts)

    def evaluation_advanced(self, texts: int) -> None:
        self._write("evaluation_advanced", texts)

    def round_done(self, record: Mapping[str, Any]) -> None:
        self._write("round_done", dict(record))

    def say(self, message: str) -> None:
        self._write("say", message)

    def warn(self, message: str) -> None:
        self._write("warn", message)

    def failed(self, message: str) -> None:
        """Report that the run has failed, and why."""
        self._write(FAILED, message)

    def finished(self) -> None:
        """Report that the run has succeeded, and that all its files are written."""
        self._write(FINISHED)


class ProgressReader:
    """Repeats the calls that a `ProgressWriter` has written to an observer in this process.

    Args:
        path: the writer's file. It need not exist yet.
        observer: receives the calls.

    Attributes:
        failure: why the run failed; None if it has not.
        finished: whether the run has succeeded.
    """

    def __init__(self, path: Path, observer: Observer) -> None:
        self._path = path
        self._observer = observer
        self._read = 0
        self.failure: str | None = None
        self.finished = False

    @property
    def started(self) -> bool:
        """Whether a writer has created the file."""
        return self._path.exists()

    def writer_ended(self) -> bool:
        """Return whether a writer has started and its process has ended, for any reason."""
        if not self.started:
            return False
        try:
            with FileLock(_lock_file(self._path), timeout=0):
                return True
        except Timeout:
            return False

    def catch_up(self) -> None:
        """Pass all complete lines that are new to the observer."""
        if not self._path.exists():
            return
        with self._path.open() as stream:
            stream.seek(self._read)
            added = stream.read()
        complete = added[: added.rfind("\n") + 1]
        self._read += len(complete.encode())
        for line in complete.splitlines():
            name, *arguments = json.loads(line)
            if name == FAILED:
                self.failure = arguments[0]
            elif name == FINISHED:
                self.finished = True
            else:
                getattr(self._observer, name)(*arguments)
