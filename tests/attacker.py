"""Attacks on a gateway, each for a number of seconds: python attacker.py KIND PORT KEYS SECONDS

KEYS is the folder of `make_certificates`. The site `rogue` in it is admitted, and misbehaves.
"""

import asyncio
import socket
import ssl
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from fedelta.flower.site.tls import site_context
from gateway_process import request, signature

FETCH = "/v1/fleet/get-fab"
PIECE = bytes(2**18)


class Attacker:
    """Attacks on the gateway at a port of this machine.

    Args:
        port: the port.
        keys: folder of `make_certificates`.
        seconds: how long an attack lasts.
    """

    def __init__(self, port: int, keys: Path, seconds: float) -> None:
        self.port = port
        self.until = time.monotonic() + seconds
        self.rogue = keys / "sites" / "rogue"
        self.known = keys / "sites" / "client-000"
        self.stranger = ssl.create_default_context(cafile=str(keys / "server" / "ca.crt"))
        self.site = site_context(self.rogue)

    async def repeat(self, tasks: int, once: Callable[[], Awaitable[None]], pause: float = 0.0) -> None:
        """Run `once` again and again in a number of tasks."""

        async def loop() -> None:
            while time.monotonic() < self.until:
                with suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                    await asyncio.wait_for(once(), max(0.1, self.until - time.monotonic()))
                await asyncio.sleep(pause)

        await asyncio.gather(*(loop() for _ in range(tasks)))

    async def connect(self, context: ssl.SSLContext | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=context)

    async def _read_to_end(self, context: ssl.SSLContext | None, *parts: bytes) -> None:
        reader, writer = await self.connect(context)
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
            await reader.read()
        finally:
            writer.transport.abort()

    async def silent(self) -> None:
        """2,000 connections that send nothing; those that are closed are opened again after a second."""
        await self.repeat(2000, lambda: self._read_to_end(None), 1.0)

    async def dribble(self) -> None:
        """2,000 handshakes with one byte a second."""

        async def once() -> None:
            hello = ssl.MemoryBIO()
            with suppress(ssl.SSLWantReadError):
                self.stranger.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="127.0.0.1").do_handshake()
            _, writer = await self.connect(None)
            try:
                for byte in hello.read():
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(1)
            finally:
                writer.transport.abort()

        await self.repeat(2000, once, 1.0)

    async def handshakes(self) -> None:
        """Handshakes without a certificate, 2,000 in twenty seconds."""
        await self.repeat(20, lambda: self._read_to_end(self.stranger), 0.2)

    async def stolen_key(self) -> None:
        """200 requests of 15 MB that name the public key of a site, by a stranger."""
        head = request(signature(self.known / "site.key"), 60 * len(PIECE))
        await self.repeat(200, lambda: self._read_to_end(self.stranger, head, *[PIECE] * 60), 5.0)

    async def long_header(self) -> None:
        """Headers of 200 MB by an admitted site, two at a time."""
        piece = b"x" * 2**20
        await self.repeat(2, lambda: self._read_to_end(self.site, b"GET / HTTP/1.1\r\na: ", *[piece] * 200), 0.5)

    async def many_headers(self) -> None:
        """A million short headers by an admitted site, two at a time."""
        piece = b"a:\r\n" * 10_000
        await self.repeat(2, lambda: self._read_to_end(self.site, b"GET / HTTP/1.1\r\n", *[piece] * 100), 0.5)

    async def large_bodies(self) -> None:
        """200 requests of 15 MB by an admitted site, whose last byte never comes."""

        async def once() -> None:
            head = request(signature(self.rogue / "site.key"), 60 * len(PIECE) + 1)
            await self._read_to_end(self.site, head, *[PIECE] * 60)

        await self.repeat(200, once, 5.0)

    async def slow_headers(self) -> None:
        """Connections of an admitted site that send a byte of their headers each second."""

        async def once() -> None:
            _, writer = await self.connect(self.site)
            try:
                for byte in request(signature(self.rogue / "site.key")):
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(1)
            finally:
                writer.transport.abort()

        await self.repeat(50, once, 1.0)

    async def never_reads(self) -> None:
        """Requests of an admitted site whose responses are never read."""

        async def once() -> None:
            _, writer = await self.connect(self.site)
            writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            try:
                for _ in range(1000):
                    writer.write(request(signature(self.rogue / "site.key"), 0, FETCH))
                    await writer.drain()
                    await asyncio.sleep(0.1)
            finally:
                writer.transport.abort()

        await self.repeat(16, once, 1.0)

    async def requests(self) -> None:
        """As many small requests of an admitted site as its sixteen connections allow."""

        async def once() -> None:
            reader, writer = await self.connect(self.site)
            try:
                while time.monotonic() < self.until:
                    writer.write(request(signature(self.rogue / "site.key"), 3) + b"abc")
                    await writer.drain()
                    await reader.read(2**16)
            finally:
                writer.transport.abort()

        await self.repeat(16, once, 0.1)


if __name__ == "__main__":
    kind, port, keys, seconds = sys.argv[1:]
    asyncio.run(getattr(Attacker(int(port), Path(keys), float(seconds)), kind)())
