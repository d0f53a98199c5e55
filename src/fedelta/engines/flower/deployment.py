"""A deployment on this machine: a SuperLink, a node for each client, one warm trainer; started, watched, stopped."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from fedelta.config import Config
from fedelta.errors import FedeltaError

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
START_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(command: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with this block, its output in a file."""
    with log.open("wb") as stream:
        child = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


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
deadline = 3600.0
resume = false
"""
    )


def run_on_loopback(config: Config, clients: Sequence[str], resume: bool, deadline: float = 600.0) -> None:
    """Run a configuration with a node for each client.

    Raises:
        FedeltaError: if a process does not start, or the run fails.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        logs = config.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(scratch / "flwr")}
        file = scratch / "config.yaml"
        file.write_text(yaml.safe_dump(config.dump()))
        write_app(scratch / "app")
        port = free_port()
        (scratch / "flwr").mkdir()
        (scratch / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        link = [
            tool("flower-superlink"),
            "--insecure",
            "--port",
            str(port),
            "--disable-runtime-dependency-installation",
        ]
        stack.enter_context(process(link, environment, logs / "superlink.log"))
        path = scratch / "trainer" / "socket"
        trainer = [sys.executable, "-m", "fedelta.engines.flower.warm_trainer", str(file), str(path)]
        stack.enter_context(process(trainer, environment, logs / "trainer.log"))
        for client in clients:
            node = [tool("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{port}"]
            node += ["--port", str(free_port()), "--node-config", f'clients="{client}" trainer="{path}"']
            stack.enter_context(process(node, environment, logs / f"node-{client}.log"))
        settings = f'config="{file}" resume={str(resume).lower()} deadline={deadline}'
        _submit(scratch, settings, environment)
        _wait(environment)


def _flwr(arguments: Sequence[str], environment: dict[str, str], cwd: Path | None = None) -> Any:
    done = subprocess.run(
        [tool("flwr"), *arguments, "--format", "json"],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise FedeltaError(f"flwr {arguments[0]}: {(done.stdout + done.stderr).strip()[-300:]}") from error


def _submit(scratch: Path, settings: str, environment: dict[str, str]) -> None:
    until = time.monotonic() + START_S
    while True:
        found = _flwr(["run", str(scratch / "app"), "loopback", "--run-config", settings], environment)
        if found.get("success"):
            return
        if time.monotonic() > until:
            raise FedeltaError(f"flwr run: {found}")
        time.sleep(0.5)


def _wait(environment: dict[str, str]) -> None:
    while True:
        found = _flwr(["list", "loopback"], environment)
        status = found["runs"][0]["status"]
        if status.startswith("finished"):
            if status != "finished:completed":
                raise FedeltaError(f"the run ended as {status}")
            return
        time.sleep(1)
