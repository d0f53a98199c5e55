"""What an observer is told in the server's process, and a person sees in another: a file of JSON lines."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedelta.engines.observer import Observer

STARTED, FAILED, FINISHED = "started", "failed", "finished"


class EventFile(Observer):
    """Writes what it is told.

    Args:
        path: is begun anew.
    """

    def __init__(self, path: Path) -> None:
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

    def started(self, process: int) -> None:
        """Whoever writes this is that process."""
        self._write(STARTED, process)

    def failed(self, message: str) -> None:
        """The run has ended badly, for this reason."""
        self._write(FAILED, message)

    def finished(self) -> None:
        """The run has ended well, and all its files are written."""
        self._write(FINISHED)


class EventReader:
    """Tells an observer what another process has written since the last time.

    Attributes:
        process: of the writer, once it has said so.
        failure: why the run ended badly, once it did.
        finished: whether it ended well.
    """

    def __init__(self, path: Path, observer: Observer) -> None:
        self._path = path
        self._observer = observer
        self._read = 0
        self.process: int | None = None
        self.failure: str | None = None
        self.finished = False

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
            elif name == STARTED:
                self.process = arguments[0]
            elif name == FINISHED:
                self.finished = True
            else:
                getattr(self._observer, name)(*arguments)
