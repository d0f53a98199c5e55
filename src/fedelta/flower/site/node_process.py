"""The processes of a Flower node: the SuperNode itself, and the fork server that starts its message handlers."""

import os
import sys
from contextlib import ExitStack
from pathlib import Path

from fedelta.flower.processes import Supervised, free_port
from fedelta.flower.site.fork_server import write_command


def start_fork_server(
    stack: ExitStack, scratch: Path, environment: dict[str, str], logs: Path, supervised: list[Supervised]
) -> dict[str, str]:
    """Start a fork server, and return the environment in which nodes use it.

    Args:
        stack: ends the fork server when it closes.
        scratch: temporary folder for its socket and its command.
        environment: environment variables of the fork server.
        logs: folder of its log.
        supervised: the list of supervised processes; the fork server is appended.
    """
    socket_path = str(scratch / "fork-server" / "socket")
    write_command(scratch / "bin", socket_path)
    command = [sys.executable, "-m", "fedelta.flower.site.fork_server", socket_path]
    supervised.append(stack.enter_context(Supervised("fork-server", lambda: command, environment, logs)))
    return {**environment, "PATH": os.pathsep.join([str(scratch / "bin"), environment["PATH"]])}


def node_command(superlink: str, settings: str, *security: str, keys: Path | None = None) -> list[str]:
    """Return the command line that starts a SuperNode.

    Args:
        superlink: address of the SuperLink or the gateway, as host:port.
        settings: the node's configuration, in Flower's syntax.
        security: command-line options for certificates and keys. Without them the connection is plain text.
        keys: folder with the certificate that the node identifies itself with.
    """
    options = ["--superlink", superlink, "--port", str(free_port()), "--node-config", settings]
    module = "fedelta.flower.site.supernode"
    return [sys.executable, "-m", module, str(keys or ""), *options, *(security or ("--insecure",))]
