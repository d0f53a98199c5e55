"""A deployment on this machine: a SuperLink, a node for each client, one warm trainer; started, watched, stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from fedelta.config import Config
from fedelta.engines.flower.events import EventReader
from fedelta.engines.flower.relay import ask
from fedelta.engines.lifetime import end_with_parent
from fedelta.engines.observer import Observer
from fedelta.errors import FedeltaError
from fedelta.runner import Run, open_run
from fedelta.tracking import RunFolder

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
START_S = 60.0
RESTARTS = 10
STATUS_S = 15.0
"""Seconds between two questions to Flower, each of which starts a process of some seconds."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


def tool(name: str) -> str:
    """The path of one of Flower's commands, beside this Python."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise FedeltaError(f"--engine flower needs the extra: pip install 'fedelta[flower]' (no {path})")
    return str(path)


def write_app(folder: Path) -> None:
    """What `flwr run` is given: names of the two apps, and the settings that they read."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        """[project]
name = "fedelta-app"
version = "0.1.0"
description = "fedelta"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedelta"

[tool.flwr.app.components]
serverapp = "fedelta.engines.flower.server_app:app"
clientapp = "fedelta.engines.flower.client_app:app"

[tool.flwr.app.config]
config = ""
events = ""
deadline = 3600.0
resume = false
"""
    )


def run_on_loopback(config: Config, resume: bool, observer: Observer, deadline: float = 3600.0) -> Run:
    """Run a configuration with a node for each client, all processes on this machine.

    Args:
        resume: go on from the checkpoint in the run's folder.
        observer: is told of progress.
        deadline: seconds of a round.

    Raises:
        FedeltaError: if a process does not start or ends early, or the run fails.
    """
    folder = RunFolder(config.folder, config.dump())
    if not resume:
        folder.refuse_existing()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedelta-")))
        logs = config.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(scratch / "flwr")}
        file = scratch / "config.yaml"
        file.write_text(yaml.safe_dump(config.dump()))
        write_app(scratch / "app")
        port = free_port()
        (scratch / "flwr").mkdir()
        (scratch / "flwr" / "config.toml").write_text(
            '[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\n'
            f'address = "127.0.0.1:{port}"\ninsecure = true\n'
        )

        def start(name: str, *command: str) -> subprocess.Popen[bytes]:
            return stack.enter_context(process(command, environment, logs / f"{name}.log"))

        superlink = start("superlink", tool("flower-superlink"), "--insecure", "--port", str(port))
        path = str(scratch / "trainer" / "socket")

        def start_trainer() -> subprocess.Popen[bytes]:
            return start("trainer", sys.executable, "-m", "fedelta.engines.flower.warm_trainer", str(file), path)

        trainer = start_trainer()
        for client in _clients(path, trainer, logs / "trainer.log"):
            settings = f'clients="{client}" trainer="{path}"'
            here = ["--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
            start(f"node-{client}", tool("flower-supernode"), "--insecure", *here, "--node-config", settings)
        events = scratch / "events.jsonl"
        settings = f'config="{file}" events="{events}" resume={str(resume).lower()} deadline={deadline}'
        _submit(scratch, settings, environment)
        trainers = Kept(trainer, start_trainer, logs / "trainer.log", observer)
        _follow(EventReader(events, observer), environment, superlink, trainers, logs)
    return open_run(config.folder)


class Kept:
    """A trainer that is started again when it ends; whoever waits for it goes on where it was.

    Args:
        process: that runs now.
        start: makes another.
        log: of the process.
        observer: is told.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        start: Callable[[], subprocess.Popen[bytes]],
        log: Path,
        observer: Observer,
    ) -> None:
        self._process = process
        self._start = start
        self._log = log
        self._observer = observer
        self._deaths = 0

    def look(self) -> None:
        """Start it again, if need be.

        Raises:
            FedeltaError: if it has ended too often.
        """
        if (code := self._process.poll()) is None:
            return
        self._deaths += 1
        if self._deaths > RESTARTS:
            raise FedeltaError(f"the trainer ended {self._deaths} times: {_last_line(self._log)}")
        self._observer.warn(f"the trainer ended with exit code {code} and is started again")
        self._process = self._start()


def _clients(path: str, trainer: subprocess.Popen[bytes], log: Path) -> list[str]:
    """The clients whose rows the trainer has read, once it is up."""
    while True:
        try:
            return list(ask(path, {"kind": "query", "clients": []})[0]["clients"])
        except OSError:
            if trainer.poll() is not None:
                raise FedeltaError(f"the trainer ended: {_last_line(log)}") from None
            time.sleep(0.1)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"{log} is empty"


def _flwr(arguments: Sequence[str], environment: dict[str, str]) -> Any:
    done = subprocess.run(
        [tool("flwr"), *arguments, "--format", "json"], env=environment, capture_output=True, text=True, check=False
    )
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise FedeltaError(f"flwr {arguments[0]}: {(done.stdout + done.stderr).strip()[-300:]}") from error


def _submit(scratch: Path, settings: str, environment: dict[str, str]) -> None:
    """Hand the app to the SuperLink, as soon as that is up."""
    until = time.monotonic() + START_S
    while True:
        found = _flwr(["run", str(scratch / "app"), "loopback", "--run-config", settings], environment)
        if found.get("success"):
            return
        if time.monotonic() > until:
            raise FedeltaError(f"flwr run: {found}")
        time.sleep(0.5)


def _follow(
    events: EventReader,
    environment: dict[str, str],
    superlink: subprocess.Popen[bytes],
    trainers: "Kept",
    logs: Path,
) -> None:
    """Tell of progress until the run ends."""
    asked = time.monotonic()
    while True:
        events.catch_up()
        if events.failure is not None:
            raise FedeltaError(events.failure)
        if events.finished:
            return
        if superlink.poll() is not None:
            raise FedeltaError(f"the SuperLink ended: {_last_line(logs / 'superlink.log')}")
        trainers.look()
        if time.monotonic() - asked > STATUS_S:
            status = _flwr(["list", "loopback"], environment)["runs"][0]["status"]
            asked = time.monotonic()
            events.catch_up()
            if status.startswith("finished") and not events.finished:
                raise FedeltaError(events.failure or f"Flower ended the run as {status}; see {logs}")
        time.sleep(0.1)
