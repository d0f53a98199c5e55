"""A SuperLink on loopback, the Flower app that runs on it, and the progress of that app."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from fedelta.errors import FedeltaError
from fedelta.federation.engines.observer import Observer
from fedelta.flower.processes import child_environment, flower_command, free_port, last_line, process
from fedelta.flower.scratch import scratch_folder
from fedelta.flower.server.progress_file import ProgressReader
from fedelta.runs.config import Config

START_S = 90.0
"""Maximum seconds until the SuperLink accepts commands, and until the ServerApp starts."""
COMMAND_S = 120.0
"""Maximum seconds for one command of Flower."""
GRACE_S = 5.0
"""Seconds in which the last progress of a ServerApp that has ended may still be read."""
CONFIG_NAME = "config.yaml"
APP_PROJECT = """[project]
name = "fedelta-app"
version = "0.1.0"
description = "fedelta"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedelta"

[tool.flwr.app.components]
serverapp = "fedelta.flower.server.server_app:app"
clientapp = "fedelta.flower.site.client_app:app"

[tool.flwr.app.config]
plan = ""
trainer = ""
"""


@contextmanager
def run_workspace(config: Config) -> Iterator[tuple[Path, Path]]:
    """Make a temporary folder that holds the configuration of a run, and yield it with the folder for logs."""
    logs = config.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with scratch_folder() as scratch:
        (scratch / CONFIG_NAME).write_text(yaml.safe_dump(config.dump()))
        yield scratch, logs


class SuperLink:
    """A SuperLink that only this machine can reach. Use it as a context manager.

    Args:
        scratch: temporary folder of the run, as `run_workspace` makes it.
        logs: folder of its log.
        certificates: folder with `ca.crt`, `server.crt` and `server.key` for 127.0.0.1. With it, the SuperLink uses
            TLS and admits only nodes with a registered key; with None, it does neither.
        simulated: number of nodes that Ray simulates, 0 for real nodes.
        port: the port to listen on; None for a free one.
    """

    def __init__(
        self, scratch: Path, logs: Path, certificates: Path | None = None, simulated: int = 0, port: int | None = None
    ) -> None:
        self.scratch = scratch
        self.log = logs / "superlink.log"
        self.port = port or free_port()
        self.certificates = certificates
        self.simulated = simulated
        flower_home = scratch / "flwr"
        flower_home.mkdir()
        self.environment = child_environment(FLWR_HOME=str(flower_home))
        self._scope = ExitStack()
        self._hold = scratch / "hold.lock"
        trust = "insecure = true" if certificates is None else f"root-certificates = {_quote(certificates / 'ca.crt')}"
        (flower_home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{self.address}"\n{trust}\n'
        )
        app = scratch / "app"
        app.mkdir()
        (app / "pyproject.toml").write_text(APP_PROJECT)

    @property
    def address(self) -> str:
        """The address of the SuperLink, as host:port."""
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> "SuperLink":
        command = [flower_command("flower-superlink"), "--host", "127.0.0.1", "--port", str(self.port)]
        if self.certificates is None:
            command += ["--insecure"]
        else:
            files = {"ca-certfile": "ca.crt", "certfile": "server.crt", "keyfile": "server.key"}
            for option, name in files.items():
                command += [f"--ssl-{option}", str(self.certificates / name)]
            command += ["--enable-supernode-auth"]
        if self.simulated:
            command += ["--simulation"]
        # Flower detaches the processes of a run. They end when this lock is released, even if this process is killed.
        self._scope.enter_context(FileLock(self._hold).acquire())
        self._process = self._scope.enter_context(process(command, self.environment, self.log))
        return self

    def __exit__(self, *_: object) -> None:
        self._scope.close()

    def check_running(self) -> None:
        """Raise a FedeltaError if the SuperLink has ended."""
        if self._process.poll() is not None:
            raise FedeltaError(f"the SuperLink ended: {last_line(self.log)}")

    def register(self, key: Path) -> int:
        """Register the public key of a node, and return the number that Flower gives to the node."""
        response = self._retry_command("supernode", "register", str(key), "here", success_key="node-id")
        return int(response["node-id"])

    def submit(self, plan: Mapping[str, Any], observer: Observer, trainer: str = "") -> ProgressReader:
        """Start our Flower app with the configuration in `scratch`.

        Args:
            plan: instructions for the ServerApp; see `server_app.main`.
            observer: receives the progress.
            trainer: socket of the trainer, for nodes whose own configuration does not name one.

        Returns:
            A reader of the app's progress, for `follow`.
        """
        plan_file, events = self.scratch / "plan.json", self.scratch / "events.jsonl"
        paths = {"config": self.scratch / CONFIG_NAME, "events": events, "hold": self._hold}
        plan_file.write_text(json.dumps({**plan, **{name: str(path) for name, path in paths.items()}}))
        arguments = ["--run-config", f"plan={_quote(plan_file)} trainer={_quote(trainer)}"]
        if self.simulated:
            arguments += ["--federation-config", f"num-supernodes={self.simulated}"]
        self._retry_command("run", str(self.scratch / "app"), "here", *arguments, success_key="success")
        return ProgressReader(events, observer)

    def _retry_command(self, *arguments: str, success_key: str) -> Any:
        """Repeat a command of Flower until the SuperLink is up, and return its JSON response.

        Args:
            arguments: the command's arguments.
            success_key: a key that the response of a successful command holds.

        Raises:
            FedeltaError: if it does not succeed within `START_S` seconds.
        """
        until = time.monotonic() + START_S
        while True:
            self.check_running()
            response = self._run_flwr(arguments)
            if isinstance(response, dict) and response.get(success_key):
                return response
            if time.monotonic() > until:
                raise FedeltaError(f"flwr {arguments[0]}: {response}; see {self.log}")
            time.sleep(0.5)

    def _run_flwr(self, arguments: Sequence[str]) -> Any:
        """Run the command `flwr` once, and return its JSON response, or the end of its output if that is not JSON."""
        command = [flower_command("flwr"), *arguments, "--format", "json"]
        try:
            done = subprocess.run(
                command, env=self.environment, capture_output=True, text=True, check=False, timeout=COMMAND_S
            )
        except subprocess.TimeoutExpired:
            return f"no response within {COMMAND_S:.0f} s"
        with suppress(ValueError):
            return json.loads(done.stdout)
        return (done.stdout + done.stderr).strip()[-300:]

    def follow(self, events: ProgressReader, check_processes: Callable[[], None]) -> None:
        """Pass the progress to the observer until the run ends.

        Args:
            events: the progress of the ServerApp.
            check_processes: called about ten times a second, to restart other processes that have ended.

        Raises:
            FedeltaError: if the run fails.
        """
        start = time.monotonic()
        ended: float | None = None
        while not events.finished:
            events.catch_up()
            if events.failure is not None:
                raise FedeltaError(events.failure)
            self.check_running()
            check_processes()
            if not events.started and time.monotonic() - start > START_S:
                raise FedeltaError(f"the ServerApp did not start within {START_S:.0f} s; see {self.log}")
            if events.writer_ended():
                # It may have written its last line after we read the file.
                ended = ended or time.monotonic()
                if time.monotonic() - ended > GRACE_S:
                    raise FedeltaError(f"the ServerApp ended without a result; see {self.log}")
            time.sleep(0.1)


def _quote(path: Path | str) -> str:
    return json.dumps(str(path))
