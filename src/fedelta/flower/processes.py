"""The processes of a deployment: start them in Flower's environment, restart them, end them with their children."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from fedelta.errors import FedeltaError, quantity
from fedelta.federation.engines.observer import Observer
from fedelta.federation.engines.process_lifetime import end_with_parent

FLOWER_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    # Flower polls for new tasks ten times a second instead of once.
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}
LOOPBACK = ("127.0.0.1", "localhost")
MAX_RESTARTS = 5
RESTART_WINDOW_S = 300.0
"""A process that needs more than `MAX_RESTARTS` restarts within these seconds is given up."""


def child_environment(**extra: str) -> dict[str, str]:
    """Return the environment of a child process: the current one, Flower's switches, and `extra`."""
    # Flower starts its own processes by name, so this Python's scripts must be on PATH even without an activated venv.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # Connections over loopback must not go through a proxy.
    before = os.environ.get("NO_PROXY") or os.environ.get("no_proxy")
    direct = ",".join(filter(None, [before, *LOOPBACK]))
    return {**os.environ, **FLOWER_ENVIRONMENT, "PATH": path, "NO_PROXY": direct, "no_proxy": direct, **extra}


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def flower_command(name: str) -> str:
    """Return the path of one of Flower's commands, which is installed beside this Python.

    Raises:
        FedeltaError: if Flower is not installed.
    """
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise FedeltaError(f"this needs the extra: pip install 'fedelta[flower]' (no {path})")
    return str(path)


def last_line(log: Path) -> str:
    """Return the last line of a process's log."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1].strip() if lines else f"{log} is empty"


class Tail:
    """Reads the lines that are added to a log after this object is made.

    Args:
        log: the file.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._read = log.stat().st_size if log.exists() else 0

    def new_lines(self) -> list[str]:
        """Return the complete lines that were added since the last call."""
        with self._log.open("rb") as stream:
            stream.seek(self._read)
            added = stream.read()
        complete = added[: added.rfind(b"\n") + 1]
        self._read += len(complete)
        return complete.decode(errors="replace").splitlines()


@contextmanager
def process(command: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process inside a `with` block and append its output to `log`.

    The process and all its children end with the block.
    """
    with log.open("ab") as stream:
        child = subprocess.Popen(
            command,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, signal.SIGTERM),
        )
    try:
        yield child
    finally:
        _signal_group(child, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(15)
        _signal_group(child, signal.SIGKILL)
        child.wait()


def _signal_group(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, number)


class Supervised:
    """A process that is restarted when it ends.

    Args:
        name: name of the process in messages and of its log file.
        command: returns the command line; called before each start.
        environment: environment variables of the process.
        logs: folder of its log.
        done: exit code that means that the process has finished its work and is not restarted.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        environment: dict[str, str],
        logs: Path,
        done: int | None = None,
    ) -> None:
        self.name = name
        self.log = logs / f"{name}.log"
        self._command = command
        self._done = done
        self._environment = environment
        self._scope = ExitStack()
        self._end_times: list[float] = []
        self._start()

    def _start(self) -> None:
        self.process = self._scope.enter_context(process(self._command(), self._environment, self.log))

    @property
    def exit_code(self) -> int | None:
        """Exit code of the process, or None while it runs."""
        return self.process.poll()

    def restart_if_ended(self, observer: Observer) -> None:
        """Restart the process if it has ended before its work was done.

        Args:
            observer: receives a warning about each restart.

        Raises:
            FedeltaError: if it has ended too often.
        """
        if (code := self.exit_code) in (None, self._done):
            return
        now = time.monotonic()
        self._end_times = [then for then in self._end_times if now - then < RESTART_WINDOW_S] + [now]
        if len(self._end_times) > MAX_RESTARTS:
            raise FedeltaError(f"{self.name} ended {quantity(len(self._end_times), 'time')}: {last_line(self.log)}")
        observer.warn(f"{self.name} ended with exit code {code} and is restarted")
        self.restart()

    def restart(self) -> None:
        """End the process and its children, and start it again."""
        self._scope.close()
        self._start()

    def __enter__(self) -> "Supervised":
        return self

    def __exit__(self, *_: object) -> None:
        self._scope.close()
