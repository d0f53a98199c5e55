"""A site of a federation: a node that connects to the server and a trainer process, until the run has ended."""

import json
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from fedelta.errors import FedeltaError
from fedelta.federation.engines.observer import Observer
from fedelta.flower.processes import LOOPBACK, Supervised, Tail, child_environment, last_line
from fedelta.flower.scratch import scratch_folder
from fedelta.flower.site.node_process import node_command, start_fork_server
from fedelta.flower.site.server_checks import SERVER_POLL_S, Refusals, ServerWatch, check_admitted, reachable
from fedelta.flower.site.tls import site_context
from fedelta.runs.config import Config

TRAINER = ("-m", "fedelta.flower.site.site_trainer")
"""Python's arguments that start the trainer."""
REFUSAL = "Failed to initialize the connection"
"""Text in the log of a node that the server refuses."""
FORGOTTEN = "forgotten"
"""The refusal of a node that the server had accepted before."""
SHUTDOWN_S = 5.0
"""Seconds that the node has to send the trainer's last reply."""


def join(
    config: Config,
    *,
    server: str,
    data: str,
    rank: int,
    keys: Path | None,
    name: str | None,
    folder: Path,
    observer: Observer,
    accept_changed_data: bool = False,
) -> None:
    """Take part in a run until the server reports that it has ended.

    Args:
        config: this site's copy of the server's configuration. The location of the model and the device may differ.
        server: address of the server, as host:port.
        data: the site's rows, a file or a folder. They are only read here.
        rank: the rank that this site can afford.
        keys: folder with `site.key`, its certificate `site.crt`, and `ca.crt`; None for plain text, which is only
            allowed on loopback.
        name: name of this site; None if the server knows it by its key.
        folder: folder for logs, and for the state that the site keeps between rounds.
        observer: receives messages about what the site does.
        accept_changed_data: take part again in a run with other rows or another base model than before.

    Raises:
        FedeltaError: if the rows or the model are missing, the server cannot be trusted, or it refuses this site.
    """
    security = _security_options(server, keys, name)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder())
        socket_path = str(scratch / "trainer" / "socket")
        site = {"data": data, "rank": rank, "name": name, "memory": str(folder / "kept"), "accept": accept_changed_data}
        trainer = stack.enter_context(_trainer(config, site, scratch, socket_path, folder))
        trainer_log = Tail(trainer.log)
        _wait_for_trainer(trainer, socket_path, trainer_log, observer)
        _wait_for_server(server, keys, trainer, observer)
        supervised = [trainer]
        environment = start_fork_server(stack, scratch, _node_environment(scratch), folder, supervised)
        command = partial(node_command, server, f'trainer="{socket_path}"', *security, keys=keys)
        node = stack.enter_context(Supervised("node", command, environment, folder))
        refusals, node_log = Refusals(server, keys or folder), Tail(node.log)
        server_watch = ServerWatch(server, keys)
        while trainer.exit_code != 0:
            _report(trainer_log, observer)
            for process in supervised:
                process.restart_if_ended(observer)
            if (refusal := _refusal(node, node_log)) is not None:
                check_admitted(server, keys)
                refusals.add(observer, forgotten=refusal == FORGOTTEN)
                node.restart()
            else:
                node.restart_if_ended(observer)
            server_watch.check(observer)
            time.sleep(0.2)
        _report(trainer_log, observer)
        time.sleep(SHUTDOWN_S)


def _node_environment(scratch: Path) -> dict[str, str]:
    """Make a folder for Flower's own files, and return the environment in which the node uses it."""
    flower_home = scratch / "flwr"
    flower_home.mkdir()
    return child_environment(FLWR_HOME=str(flower_home))


def _refusal(node: Supervised, log: Tail) -> str | None:
    """Return how the server has refused a node that has ended, or None if it has not."""
    if node.exit_code is None:
        return None
    if any(REFUSAL in line for line in log.new_lines()):
        return REFUSAL
    # A node that the server no longer knows ends as if it had been asked to, with exit code 0.
    return FORGOTTEN if node.exit_code == 0 else None


def _trainer(config: Config, site: Mapping[str, Any], scratch: Path, socket_path: str, logs: Path) -> Supervised:
    """Start the site's trainer as a process that is restarted if it dies.

    Args:
        config: the site's configuration.
        site: the arguments of `SiteTrainer` other than the configuration.
        scratch: temporary folder for both.
        socket_path: the socket that the trainer listens on.
        logs: folder of its log.
    """
    (scratch / "config.yaml").write_text(yaml.safe_dump(config.dump()))
    (scratch / "site.json").write_text(json.dumps(site))
    command = [sys.executable, *TRAINER, str(scratch / "config.yaml"), socket_path, str(scratch / "site.json")]
    return Supervised("trainer", lambda: command, child_environment(), logs, done=0)


def _wait_for_trainer(trainer: Supervised, socket_path: str, log: Tail, observer: Observer) -> None:
    """Wait until the trainer listens.

    Raises:
        FedeltaError: if the trainer ends before; the message is the last line of its log.
    """
    while not Path(socket_path).exists():
        _report(log, observer)
        if trainer.exit_code is not None:
            raise FedeltaError(last_line(trainer.log))
        time.sleep(0.1)


def _wait_for_server(server: str, keys: Path | None, trainer: Supervised, observer: Observer) -> None:
    """Wait until the server listens.

    Raises:
        FedeltaError: if the site does not trust the server, or the server does not know the site's key.
    """
    observer.say(f"waiting for the server at {server}")
    while not reachable(server, keys):
        trainer.restart_if_ended(observer)
        time.sleep(SERVER_POLL_S)
    check_admitted(server, keys)


def _report(log: Tail, observer: Observer) -> None:
    """Pass the lines that the trainer has logged since the last call to the observer."""
    for line in log.new_lines():
        observer.say(line)


def _security_options(server: str, keys: Path | None, name: str | None) -> list[str]:
    """Return the node's command-line options for certificates and keys.

    Raises:
        FedeltaError: if the address is not valid, a file is missing or damaged, or plain text would leave loopback.
    """
    if (keys is None) == (name is None):
        raise FedeltaError("join: pass --keys FOLDER, or --insecure with --name NAME for a trial on loopback")
    host, _, port = server.rpartition(":")
    if not host or not port.isdigit():
        raise FedeltaError(f"--server {server}: expected HOST:PORT")
    if keys is None:
        if host not in LOOPBACK:
            raise FedeltaError(f"--insecure is for loopback, found --server {server}")
        return ["--insecure"]
    site_context(keys)
    return ["--root-certificates", str(keys / "ca.crt"), "--auth-supernode-private-key", str(keys / "site.key")]
