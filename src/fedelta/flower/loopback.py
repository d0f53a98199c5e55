"""A deployment on this machine: a SuperLink, a node for each client, one warm trainer; started, watched, stopped."""

import shutil
import sys
import time
from contextlib import ExitStack
from functools import partial

from fedelta.errors import FedeltaError
from fedelta.federation.checkpoint import load_checkpoint
from fedelta.federation.client import pack_kept
from fedelta.federation.engines.observer import Observer
from fedelta.federation.run_folder import RunFolder
from fedelta.files import write_file
from fedelta.flower.processes import Supervised, environment, last_line
from fedelta.flower.server.engine import check
from fedelta.flower.server.superlink import CONFIG, SuperLink, workplace
from fedelta.flower.site.ipc import ask
from fedelta.flower.site.node_process import node_command, with_starter
from fedelta.runs.config import Config
from fedelta.runs.runner import Run, open_run

NODES_S = 300.0
"""How long a run waits for the nodes that it has started."""


def run_on_loopback(config: Config, resume: bool, observer: Observer, ray: bool = False) -> Run:
    """Run a configuration with a node for each client, all processes on this machine.

    Args:
        resume: go on from the checkpoint in the run's folder.
        observer: is told of progress.
        ray: have Flower simulate the nodes on Ray, instead of a process for each.

    Raises:
        FedeltaError: if a process does not start or ends early, or the run fails.
    """
    check(config)
    folder = RunFolder(config.folder, config.dump())
    if not resume:
        folder.refuse_existing()
    with ExitStack() as stack:
        scratch, logs = stack.enter_context(workplace(config))
        socket = str(scratch / "trainer" / "socket")
        memory = folder.clients_folder
        if not resume:
            shutil.rmtree(memory, ignore_errors=True)
        elif folder.checkpoint_file.exists():
            # Rounds in process keep it in the checkpoint.
            for client, feedback in load_checkpoint(folder.checkpoint_file).error_feedback.items():
                write_file(memory / f"{client}.safetensors", pack_kept(None, feedback))
        trainer = [
            sys.executable,
            "-m",
            "fedelta.flower.site.trainer_process",
            str(scratch / CONFIG),
            socket,
            str(memory),
        ]
        kept = [stack.enter_context(Supervised("trainer", lambda: trainer, environment(), logs))]
        # Before anything of Flower's starts: bad data or a bad model shows here.
        clients = _clients(socket, kept[0])
        link = stack.enter_context(SuperLink(scratch, logs, simulated=len(clients) if ray else 0))
        events = link.submit({"resume": resume, "clients": clients, "patience": NODES_S}, observer, trainer=socket)
        home = with_starter(stack, scratch, link.environment, logs, kept) if not ray else {}
        for client in [] if ray else clients:
            command = partial(node_command, link.address, f'client="{client}" trainer="{socket}"')
            kept.append(stack.enter_context(Supervised(f"node-{client}", command, home, logs)))

        def look() -> None:
            for each in kept:
                each.look(observer)

        link.follow(events, look)
    return open_run(config.folder)


def _clients(socket: str, trainer: Supervised) -> list[str]:
    """The clients whose rows the trainer has read, once it is up."""
    while True:
        try:
            return list(ask(socket, {"kind": "query"})[0]["clients"])
        except OSError:
            if trainer.ended is not None:
                raise FedeltaError(last_line(trainer.log)) from None
            time.sleep(0.1)
