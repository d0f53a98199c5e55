"""The server's side of a deployment: a SuperLink on loopback, the app that runs on it, and how that goes."""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from fedelta.errors import FedeltaError
from fedelta.federation.engines.observer import Observer
from fedelta.flower.processes import environment, free_port, last_line, process, tool
from fedelta.flower.server.progress_file import ProgressReader
from fedelta.runs.config import Config

START_S = 90.0
COMMAND_S = 120.0
GRACE_S = 5.0
CONFIG = "config.yaml"
APP = """[project]
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
def workplace(config: Config) -> Iterator[tuple[Path, Path]]:
    """A folder of this run alone with its configuration, which ends with the block, and the folder of its logs."""
    logs = config.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fedelta-") as scratch:
        (Path(scratch) / CONFIG).write_text(yaml.safe_dump(config.dump()))
        yield Path(scratch), logs


class SuperLink:
    """A SuperLink that only this machine can reach.

    Args:
        scratch: its workplace.
        logs: folder of its log.
        certificates: folder with `ca.crt`, `server.crt` and `server.key` for 127.0.0.1: with TLS, and only nodes whose
            keys are registered; None is neither.
        simulated: number of nodes that Ray simulates, 0 for real ones.
        port: None is one that is free.
    """

    def __init__(
        self, scratch: Path, logs: Path, certificates: Path | None = None, simulated: int = 0, port: int | None = None
    ) -> None:
        self.scratch = scratch
        self.log = logs / "superlink.log"
        self.port = port or free_port()
        self.certificates = certificates
        self.simulated = simulated
        home = scratch / "flwr"
        home.mkdir()
        self.environment = environment(FLWR_HOME=str(home))
        self._scope = ExitStack()
        self._hold = scratch / "hold.lock"
        trust = "insecure = true" if certificates is None else f"root-certificates = {_quote(certificates / 'ca.crt')}"
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{self.address}"\n{trust}\n'
        )
        app = scratch / "app"
        app.mkdir()
        (app / "pyproject.toml").write_text(APP)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> "SuperLink":
        command = [tool("flower-superlink"), "--host", "127.0.0.1", "--port", str(self.port)]
        if self.certificates is None:
            command += ["--insecure"]
        else:
            files = {"ca-certfile": "ca.crt", "certfile": "server.crt", "keyfile": "server.key"}
            for option, name in files.items():
                command += [f"--ssl-{option}", str(self.certificates / name)]
            command += ["--enable-supernode-auth"]
        if self.simulated:
            command += ["--simulation"]
        # Flower detaches what it starts for a run; that ends when this lets go, however it comes to that.
        self._scope.enter_context(FileLock(self._hold).acquire())
        self._process = self._scope.enter_context(process(command, self.environment, self.log))
        return self

    def __exit__(self, *_: object) -> None:
        self._scope.close()

    def check(self) -> None:
        """Whether it is still there.

        Raises:
            FedeltaError: if it has ended.
        """
        if self._process.poll() is not None:
            raise FedeltaError(f"the SuperLink ended: {last_line(self.log)}")

    def register(self, key: Path) -> int:
        """Have it accept the node with this public key, and give it a number."""
        found = self._ask_until("supernode", "register", str(key), "here", taken="node-id")
        return int(found["node-id"])

    def submit(self, plan: Mapping[str, Any], observer: Observer, trainer: str = "") -> ProgressReader:
        """Have it run our app with the configuration of its workplace.

        Args:
            plan: what the ServerApp is to do.
            observer: will be told how that goes.
            trainer: socket of the trainer, for nodes that do not know theirs.
        """
        file, events = self.scratch / "plan.json", self.scratch / "events.jsonl"
        places = {"config": self.scratch / CONFIG, "events": events, "hold": self._hold}
        file.write_text(json.dumps({**plan, **{name: str(path) for name, path in places.items()}}))
        arguments = ["--run-config", f"plan={_quote(file)} trainer={_quote(trainer)}"]
        if self.simulated:
            arguments += ["--federation-config", f"num-supernodes={self.simulated}"]
        self._ask_until("run", str(self.scratch / "app"), "here", *arguments, taken="success")
        return ProgressReader(events, observer)

    def _ask_until(self, *arguments: str, taken: str) -> Any:
        """Flower's answer to a command, as soon as the SuperLink is up."""
        until = time.monotonic() + START_S
        while True:
            self.check()
            found = self._flwr(arguments)
            if isinstance(found, dict) and found.get(taken):
                return found
            if time.monotonic() > until:
                raise FedeltaError(f"flwr {arguments[0]}: {found}; see {self.log}")
            time.sleep(0.5)

    def _flwr(self, arguments: Sequence[str]) -> Any:
        command = [tool("flwr"), *arguments, "--format", "json"]
        try:
            done = subprocess.run(
                command, env=self.environment, capture_output=True, text=True, check=False, timeout=COMMAND_S
            )
        except subprocess.TimeoutExpired:
            return f"no answer within {COMMAND_S:.0f} s"
        with suppress(ValueError):
            return json.loads(done.stdout)
        return (done.stdout + done.stderr).strip()[-300:]

    def follow(self, events: ProgressReader, look: Callable[[], None]) -> None:
        """Tell of progress until the run ends.

        Args:
            events: of the ServerApp.
            look: is called again and again, to look after other processes.

        Raises:
            FedeltaError: if the run fails.
        """
        begun = time.monotonic()
        gone: float | None = None
        while not events.finished:
            events.catch_up()
            if events.failure is not None:
                raise FedeltaError(events.failure)
            self.check()
            look()
            if not events.begun and time.monotonic() - begun > START_S:
                raise FedeltaError(f"the ServerApp did not start within {START_S:.0f} s; see {self.log}")
            if events.abandoned():
                # It may have said its last word since we read.
                gone = gone or time.monotonic()
                if time.monotonic() - gone > GRACE_S:
                    raise FedeltaError(f"the ServerApp ended without a word; see {self.log}")
            time.sleep(0.1)


def _quote(path: Path | str) -> str:
    return json.dumps(str(path))
