"""What an observer is told in the server's process, and a person sees in another: a file of JSON lines."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedelta.federation.engines.observer import Observer

FAILED, FINISHED = "failed", "finished"


def _lock(path: Path) -> Path:
    return path.with_suffix(".lock")


class ProgressWriter(Observer):
    """Writes what it is told.

    Args:
        path: is begun anew. While this process lives it holds a lock beside it.
    """

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(_lock(path))
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
        """The run has ended badly, for this reason."""
        self._write(FAILED, message)

    def finished(self) -> None:
        """The run has ended well, and all its files are written."""
        self._write(FINISHED)


class ProgressReader:
    """Tells an observer what another process has written since the last time.

    Attributes:
        failure: why the run ended badly, once it did.
        finished: whether it ended well.
    """

    def __init__(self, path: Path, observer: Observer) -> None:
        self._path = path
        self._observer = observer
        self._read = 0
        self.failure: str | None = None
        self.finished = False

    @property
    def begun(self) -> bool:
        """Whether there has been a writer."""
        return self._path.exists()

    def abandoned(self) -> bool:
        """Whether there has been a writer and is none any more, however it ended."""
        if not self.begun:
            return False
        try:
            with FileLock(_lock(self._path), timeout=0):
                return True
        except Timeout:
            return False

    def catch_up(self) -> None:
        """Pass on all whole lines that are new."""
        if not self._path.exists():
            return
        with self._path.open() as stream:
            stream.seek(self._read)
            found = stream.read()
        whole = found[: found.rfind("\n") + 1]
        self._read += len(whole.encode())
        for line in whole.splitlines():
            name, *arguments = json.loads(line)
            if name == FAILED:
                self.failure = arguments[0]
            elif name == FINISHED:
                self.finished = True
            else:
                getattr(self._observer, name)(*arguments)
