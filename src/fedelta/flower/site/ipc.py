"""Messages between a site's ClientApp and its trainer, over a Unix socket that only its owner can open.

A message is a JSON object and a blob, each preceded by its length in bytes. This module does not import torch: Flower
starts a process for each message, and importing torch would take that process longer than the message itself.

It does not use `multiprocessing.connection`, which has no timeout for a message that stops halfway, and allocates
memory for the whole length that a sender claims.
"""

import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

LENGTH = struct.Struct("!Q")
MAX_PART = 2**34
"""Maximum size of the JSON object or the blob in bytes. A greater length cannot come from this module."""
CHUNK = 2**20


class IpcError(ConnectionError):
    """The other end closed the connection, or does not follow the protocol."""


def listen(path: Path) -> socket.socket:
    """Make a listening socket that only its owner can open.

    Args:
        path: where to put it. Its folder is made if needed, without permissions for other users.
    """
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
    """Send a message.

    Args:
        connection: a connected socket.
        facts: the JSON object.
        blob: the binary part.
    """
    head = json.dumps(facts).encode()
    connection.sendall(LENGTH.pack(len(head)) + head + LENGTH.pack(len(blob)))
    # A message with an empty blob is complete here. The other end may already have replied and closed the connection,
    # and then even sending zero bytes raises BrokenPipeError.
    if blob:
        connection.sendall(blob)


def receive(connection: socket.socket) -> tuple[dict[str, Any], bytes]:
    """Receive a message.

    Returns:
        The JSON object and the blob.

    Raises:
        IpcError: if the connection ends before the message does, or a part is longer than `MAX_PART`.
    """
    return json.loads(_receive_part(connection)), _receive_part(connection)


def _receive_part(connection: socket.socket) -> bytes:
    size = LENGTH.unpack(_receive_exactly(connection, LENGTH.size))[0]
    if size > MAX_PART:
        raise IpcError(f"a message of {size} bytes, expected at most {MAX_PART}")
    return _receive_exactly(connection, size)


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        chunk = connection.recv(min(size - len(received), CHUNK))
        if not chunk:
            raise IpcError("the connection ended within a message")
        received += chunk
    return bytes(received)


def ask(path: str, facts: dict[str, Any], blob: bytes = b"") -> tuple[dict[str, Any], bytes]:
    """Send a message to the socket at `path`, and return the reply."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        send(connection, facts, blob)
        return receive(connection)
