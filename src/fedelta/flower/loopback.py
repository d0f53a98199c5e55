"""A whole deployment on one machine: a SuperLink, a node per client, and one trainer process that serves them all."""

import shutil
import sys
import time
from contextlib import ExitStack
from functools import partial

from fedelta.errors import FedeltaError
from fedelta.federation.client import pack_kept
from fedelta.federation.engines.observer import Observer
from fedelta.federation.run_folder import RunFolder
from fedelta.files import write_file
from fedelta.flower.processes import Supervised, child_environment, last_line
from fedelta.flower.server.engine import check_config
from fedelta.flower.server.superlink import CONFIG_NAME, SuperLink, run_workspace
from fedelta.flower.site.ipc import ask
from fedelta.flower.site.node_process import node_command, start_fork_server
from fedelta.runs.config import Config
from fedelta.runs.runner import Run, open_run

NODES_START_S = 300.0
"""Seconds that a run waits for the nodes that it has started."""


def run_on_loopback(
    config: Config, resume: bool, observer: Observer, ray: bool = False, accept_changed_data: bool = False
) -> Run:
    """Run a configuration with one node per client, with all processes on this machine.

    Args:
        config: the run.
        resume: resume from the checkpoint in the run's folder.
        observer: receives the progress.
        ray: let Flower simulate the nodes on Ray, instead of starting a process for each.
        accept_changed_data: as for `fedelta.runs.runner.run`.

    Raises:
        FedeltaError: if a process does not start or ends early, or the run fails.
    """
    check_config(config)
    folder = RunFolder(config.folder, config.dump())
    if not resume:
        folder.refuse_existing()
    with ExitStack() as stack:
        scratch, logs = stack.enter_context(run_workspace(config))
        socket = str(scratch / "trainer" / "socket")
        memory = folder.clients_folder
        if not resume:
            shutil.rmtree(memory, ignore_errors=True)
        elif (checkpoint := folder.saved(observer.warn)) is not None:
            # A run in one process stores the clients' error feedback in its checkpoint.
            for client, feedback in checkpoint.error_feedback.items():
                write_file(memory / f"{client}.safetensors", pack_kept(None, feedback))
        trainer_command = [
            sys.executable,
            "-m",
            "fedelta.flower.site.trainer_process",
            str(scratch / CONFIG_NAME),
            socket,
            str(memory),
        ]
        trainer = stack.enter_context(Supervised("trainer", lambda: trainer_command, child_environment(), logs))
        supervised = [trainer]
        # Wait for the trainer before Flower starts, so that an error in the data or the model is reported at once.
        clients = _wait_for_clients(socket, trainer)
        link = stack.enter_context(SuperLink(scratch, logs, simulated=len(clients) if ray else 0))
        plan = {"resume": resume, "accept_changed_data": accept_changed_data, "clients": clients}
        plan |= {"patience": NODES_START_S}
        events = link.submit(plan, observer, trainer=socket)
        if not ray:
            environment = start_fork_server(stack, scratch, link.environment, logs, supervised)
            for client in clients:
                command = partial(node_command, link.address, f'client="{client}" trainer="{socket}"')
                supervised.append(stack.enter_context(Supervised(f"node-{client}", command, environment, logs)))

        def check_processes() -> None:
            for process in supervised:
                process.restart_if_ended(observer)

        link.follow(events, check_processes)
    return open_run(config.folder)


def _wait_for_clients(socket: str, trainer: Supervised) -> list[str]:
    """Wait until the trainer listens, and return the clients whose rows it has read.

    Raises:
        FedeltaError: if the trainer ends; the message is the last line of its log.
    """
    while True:
        try:
            return list(ask(socket, {"kind": "query"})[0]["clients"])
        except OSError:
            if trainer.exit_code is not None:
                raise FedeltaError(last_line(trainer.log)) from None
            time.sleep(0.1)
