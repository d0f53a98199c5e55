"""Starts the processes of Flower's ClientApps by fork, from a process that has already imported Flower.

Flower starts a process for each message, and importing Flower takes that process more than a second of CPU time. Flower
finds the program by name. So the PATH of a node begins with a folder that holds a program of that name, which asks this
server to fork. If the server does not respond, the program starts a process of its own instead.

python -m fedelta.flower.site.fork_server SOCKET                forks a process for each request
python -m fedelta.flower.site.fork_server --now ARGUMENTS…      is such a process
"""

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fedelta.federation.engines.process_lifetime import end_with_parent
from fedelta.flower.site.ipc import IpcError, listen, receive

NAME = "flwr-clientapp"
"""The program that Flower starts for each message."""

# It sends a message as `ipc.send` does, but imports nothing outside the standard library, so that it starts fast.
REQUEST_SCRIPT = """import json, os, socket, struct, sys
try:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect({socket!r})
        head = json.dumps({{"arguments": sys.argv[1:]}}).encode()
        connection.sendall(struct.pack("!Q", len(head)) + head + struct.pack("!Q", 0))
        if connection.recv(1) != b"1":
            raise OSError
except OSError:
    os.execv({python!r}, [{python!r}, "-m", "fedelta.flower.site.fork_server", "--now", *sys.argv[1:]])
"""


def write_command(folder: Path, socket_path: str) -> None:
    """Write the program that asks the fork server for a process.

    Args:
        folder: a new folder, for the front of a node's PATH.
        socket_path: path of the fork server's socket.
    """
    folder.mkdir()
    script = folder / "request_fork.py"
    script.write_text(REQUEST_SCRIPT.format(socket=socket_path, python=sys.executable))
    # -S -E: the script needs no site packages and no environment variables, and starts much faster without them.
    (folder / NAME).write_text(f"#!/bin/sh\nexec '{sys.executable}' -S -E '{script}' \"$@\"\n")
    (folder / NAME).chmod(0o700)


def serve(server: socket.socket) -> None:
    """Fork a process for each request. Never returns."""
    handle_message = load_handler()
    # Let the kernel remove the children when they end, because this process does not wait for them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = server.accept()
        try:
            arguments = receive(connection)[0]["arguments"]
            child = os.fork()
            if child == 0:
                server.close()
                connection.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                end_with_parent(signal.SIGTERM)
                try:
                    handle_message(arguments)
                finally:
                    sys.stdout.flush()
                    os._exit(0)
            connection.sendall(b"1")
        except (IpcError, OSError, ValueError, KeyError):
            pass
        finally:
            connection.close()


def load_handler() -> Callable[[Sequence[str]], None]:
    """Import Flower's program, and return a function that runs it with the given arguments."""
    from flwr.app.error import Error
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    def without_reason(code: int, reason: str | None = None) -> Error:  # noqa: ARG001
        return Error(code=code)

    # Flower would send the text of an exception to the server, with paths of this machine.
    run_clientapp.Error = without_reason

    def handle_message(arguments: Sequence[str]) -> None:
        sys.argv = [NAME, *arguments]
        flwr_clientapp()

    return handle_message


if __name__ == "__main__":
    if sys.argv[1] == "--now":
        load_handler()(sys.argv[2:])
    serve(listen(Path(sys.argv[1])))
