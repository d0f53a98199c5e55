"""The processes of a Flower node: the SuperNode itself, and the fork server that starts its message handlers."""

import os
import sys
from contextlib import ExitStack
from pathlib import Path

from fedelta.flower.processes import Supervised, free_port
from fedelta.flower.site.fork_server import write_command


def with_starter(
    stack: ExitStack, scratch: Path, environment: dict[str, str], logs: Path, kept: list[Supervised]
) -> dict[str, str]:
    """Start what starts the processes of nodes, add it to those kept, and return the nodes' environment."""
    path = str(scratch / "starter" / "socket")
    write_command(scratch / "bin", path)
    command = [sys.executable, "-m", "fedelta.flower.site.fork_server", path]
    kept.append(stack.enter_context(Supervised("starter", lambda: command, environment, logs)))
    return {**environment, "PATH": os.pathsep.join([str(scratch / "bin"), environment["PATH"]])}


def node_command(superlink: str, settings: str, *security: str) -> list[str]:
    """What starts a SuperNode.

    Args:
        superlink: its address.
        settings: of the node, as Flower writes them.
        security: options of certificates and keys, none for a connection in plain text.
    """
    place = ["--superlink", superlink, "--port", str(free_port())]
    command = [sys.executable, "-m", "fedelta.flower.site.supernode", *place, "--node-config", settings]
    return [*command, *(security or ("--insecure",))]
