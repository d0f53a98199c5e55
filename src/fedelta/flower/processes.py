"""Processes of a deployment: started in Flower's environment, watched, started again, ended with what they started."""

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

from fedelta.errors import FedeltaError
from fedelta.federation.engines.observer import Observer
from fedelta.federation.engines.process_lifetime import end_with_parent

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    # Ten times a second instead of once, whether there is something to do.
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}
LOOPBACK = ("127.0.0.1", "localhost")
RESTARTS = 5
WITHIN_S = 300.0
"""More restarts than these within these seconds, and a process is given up."""


def environment(**more: str) -> dict[str, str]:
    """Of a process: this one's, and what Flower is to be told."""
    # Flower starts its own processes by name, also where nobody has activated this Python's environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # What goes over loopback goes through nobody's proxy.
    before = os.environ.get("NO_PROXY") or os.environ.get("no_proxy")
    direct = ",".join(filter(None, [before, *LOOPBACK]))
    return {**os.environ, **ENVIRONMENT, "PATH": path, "NO_PROXY": direct, "no_proxy": direct, **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tool(name: str) -> str:
    """The path of one of Flower's commands, beside this Python."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise FedeltaError(f"this needs the extra: pip install 'fedelta[flower]' (no {path})")
    return str(path)


def last_line(log: Path) -> str:
    """What a process said last."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1].strip() if lines else f"{log} is empty"


class Tail:
    """Reads on in a log from where it ended in the beginning."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._read = log.stat().st_size if log.exists() else 0

    def lines(self) -> list[str]:
        """Whole lines that are new."""
        with self._log.open("rb") as stream:
            stream.seek(self._read)
            found = stream.read()
        whole = found[: found.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.decode(errors="replace").splitlines()


@contextmanager
def process(command: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with this block, and all that it has started; its output in a file."""
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
    """A process that is started again when it ends; whoever waits for it goes on where it was.

    Args:
        name: for people, and of its log.
        command: gives what starts it, each time anew.
        environment: of it.
        logs: folder of its log.
        done: exit code by which it says that it has nothing more to do.
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
        self._deaths: list[float] = []
        self._start()

    def _start(self) -> None:
        self.process = self._scope.enter_context(process(self._command(), self._environment, self.log))

    @property
    def ended(self) -> int | None:
        """Its exit code, if it has ended."""
        return self.process.poll()

    def look(self, observer: Observer) -> None:
        """Start it again, if need be.

        Raises:
            FedeltaError: if it has ended too often.
        """
        if (code := self.ended) in (None, self._done):
            return
        now = time.monotonic()
        self._deaths = [then for then in self._deaths if now - then < WITHIN_S] + [now]
        if len(self._deaths) > RESTARTS:
            raise FedeltaError(f"{self.name} ended {len(self._deaths)} times: {last_line(self.log)}")
        observer.warn(f"{self.name} ended with exit code {code} and is started again")
        self.restart()

    def restart(self) -> None:
        """End it, with what it has started itself, and start it again."""
        self._scope.close()
        self._start()

    def __enter__(self) -> "Supervised":
        return self

    def __exit__(self, *_: object) -> None:
        self._scope.close()
