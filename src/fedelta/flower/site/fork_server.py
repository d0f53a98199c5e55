"""Starts the processes of Flower's ClientApps by fork, from one that has imported what they need.

Flower starts a process for each message, which takes a second and more of a core to import Flower itself. It starts it
by name; so the nodes' PATH begins with a folder in which that name asks here, and where nobody answers there it is
Flower's own again.

python -m fedelta.flower.site.fork_server SOCKET
"""

import os
import signal
import socket
import sys
from pathlib import Path

from fedelta.federation.engines.process_lifetime import end_with_parent
from fedelta.flower.site.ipc import RelayError, listen, receive

NAME = "flwr-clientapp"
ASK = """import json, os, socket, struct, sys
try:
    with socket.socket(socket.AF_UNIX) as starter:
        starter.connect({socket!r})
        head = json.dumps({{"arguments": sys.argv[1:]}}).encode()
        starter.sendall(struct.pack("!Q", len(head)) + head + struct.pack("!Q", 0))
        if starter.recv(1) != b"1":
            raise OSError
except OSError:
    os.execv({command!r}, [{command!r}, *sys.argv[1:]])
"""


def write_command(folder: Path, starter: str) -> None:
    """Make the folder that a node's PATH begins with.

    Args:
        starter: its socket.
    """
    folder.mkdir()
    command = str(Path(sys.executable).with_name(NAME))
    (folder / "ask.py").write_text(ASK.format(socket=starter, command=command))
    # -S -E: nothing of the environment's Python is needed, and without it this starts in an instant.
    (folder / NAME).write_text(f"#!/bin/sh\nexec '{sys.executable}' -S -E '{folder / 'ask.py'}' \"$@\"\n")
    (folder / NAME).chmod(0o700)


def serve(server: socket.socket) -> None:
    """Fork a process for each message, for ever."""
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    # Nobody waits for them.
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
                sys.argv = [NAME, *arguments]
                try:
                    flwr_clientapp()
                finally:
                    sys.stdout.flush()
                    os._exit(0)
            connection.sendall(b"1")
        except (RelayError, OSError, ValueError, KeyError):
            pass
        finally:
            connection.close()


if __name__ == "__main__":
    serve(listen(Path(sys.argv[1])))
