"""Bytes between a site's Flower client and its warm trainer, over a unix socket that only its owner may open.

A message is a line of JSON and a blob, each with its length before it. No torch here: Flower starts a process for each
message, and importing torch would cost it more than the message.
"""

import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

LENGTH = struct.Struct("!Q")
MOST = 2**34
"""Bytes of a blob at most: a length beyond it is not one of ours."""


class RelayError(ConnectionError):
    """The other end is gone, or does not speak this."""


def listen(path: Path) -> socket.socket:
    """A socket for a trainer, in a folder of which others have nothing."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        server.bind(str(path))
    finally:
        os.umask(before)
    server.listen()
    return server


def send(connection: socket.socket, facts: dict[str, Any], blob: bytes = b"") -> None:
    head = json.dumps(facts).encode()
    connection.sendall(LENGTH.pack(len(head)) + head + LENGTH.pack(len(blob)))
    # A message without a blob has ended: it may be answered already and the other side gone, where even sending
    # nothing is a broken pipe.
    if blob:
        connection.sendall(blob)


def receive(connection: socket.socket) -> tuple[dict[str, Any], bytes]:
    """The other side's next message.

    Raises:
        RelayError: if the connection ends before it, or a length is absurd.
    """
    return json.loads(_part(connection)), _part(connection)


def _part(connection: socket.socket) -> bytes:
    size = LENGTH.unpack(_exactly(connection, LENGTH.size))[0]
    if size > MOST:
        raise RelayError(f"a message of {size} bytes, expected at most {MOST}")
    return _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        piece = connection.recv(min(size - len(found), 2**20))
        if not piece:
            raise RelayError("the connection ended within a message")
        found += piece
    return bytes(found)


def ask(path: str, facts: dict[str, Any], blob: bytes = b"") -> tuple[dict[str, Any], bytes]:
    """One question to a trainer and its answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        send(connection, facts, blob)
        return receive(connection)
