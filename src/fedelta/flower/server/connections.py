"""Connections from the network to the gateway: TLS with certificates on both sides, then HTTP within limits.

Anyone can open a connection, so a stranger must cost little: the handshake has a time limit, the number of unfinished
handshakes is limited, and each turn of the event loop accepts one connection, so that a flood of them leaves time for
the requests of sites. Only a peer with a certificate of the federation's authority reaches HTTP.
"""

import asyncio
import contextlib
import resource
import socket
import ssl
import sys
from asyncio import sslproto
from collections import Counter
from pathlib import Path
from typing import Any

import h11
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from fedelta.flower.authority import encode_public_key
from fedelta.flower.server.admission import RELOAD_S, Admission
from fedelta.flower.server.refusals import RefusalLog

HANDSHAKE_TIMEOUT_S = 10.0
"""Maximum seconds of a TLS handshake, from the connection to its end."""
CLOSE_TIMEOUT_S = 5.0
MAX_HANDSHAKES = 128
"""Maximum number of unfinished handshakes. A new one displaces the oldest of the address that has the most."""
MAX_CONNECTIONS = 512
MAX_CONNECTIONS_PER_SITE = 16
"""Flower's node uses about five."""
MAX_CONNECTIONS_PER_STRANGER = 2
"""Maximum number of connections of a key that is not admitted. They are only told so."""
HEADER_TIMEOUT_S = 10.0
"""Maximum seconds from the first byte of a request to the end of its headers."""
IDLE_TIMEOUT_S = 75
MAX_HEADER_BYTES = 16 * 2**10
TLS_BUFFER = 64 * 2**10
"""Bytes of the buffer that asyncio keeps for each TLS connection, which are 256 KiB by default."""
NO_CERTIFICATE = "it has no certificate, expected one that the federation's authority signed"
OTHER_AUTHORITY = "its certificate was not signed by the federation's authority (ca.crt)"
VERIFICATION = {
    9: "its certificate is not valid yet; do both clocks agree?",
    10: "its certificate has expired (`fedelta keys FOLDER --renew` makes new ones)",
    **dict.fromkeys((18, 19, 20, 21), OTHER_AUTHORITY),
}
"""OpenSSL's number of a reason why a certificate is not valid → that reason."""


def server_context(folder: Path) -> ssl.SSLContext:
    """Return the TLS settings of a server: it identifies itself, and requires a certificate of the authority.

    Args:
        folder: the server's folder, with `server.crt`, `server.key` and the authority's `ca.crt`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    context.load_verify_locations(folder / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def explain_handshake(error: BaseException) -> str:
    """Return why a TLS handshake failed, in words that name what was expected."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return VERIFICATION.get(error.verify_code, f"its certificate is not valid: {error.verify_message}")
    if isinstance(error, ssl.SSLError):
        if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            return NO_CERTIFICATE
        return f"its TLS handshake failed ({error.reason or 'no reason given'})"
    if isinstance(error, ConnectionAbortedError):
        return f"its TLS handshake was not finished within {HANDSHAKE_TIMEOUT_S:.0f} s"
    return "it closed the connection within the TLS handshake"


class AlertingProtocol(sslproto.SSLProtocol):
    """asyncio's TLS with a smaller buffer, which tells the peer why its certificate is refused.

    asyncio itself closes the connection without sending the alert that OpenSSL has written.
    """

    max_size = TLS_BUFFER

    def _on_handshake_complete(self, handshake_exc: BaseException | None) -> None:
        if handshake_exc is not None:
            self._process_outgoing()  # type: ignore[attr-defined]
        super()._on_handshake_complete(handshake_exc)


class SiteConnection(H11Protocol):
    """One connection of a peer with a certificate of the authority, which need not be that of an admitted site.

    `state` of its requests holds the peer's public key as `key`, and its name by the certificate as `name`.

    Args:
        server: the server that has accepted it.
    """

    def __init__(self, server: "SiteServer") -> None:
        super().__init__(server.config, server.server_state, {})
        self._site_server = server
        self._timer: asyncio.TimerHandle | None = None
        self.key = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        certificate = x509.load_der_x509_certificate(transport.get_extra_info("ssl_object").getpeercert(True))
        public_key = certificate.public_key()
        self.key = encode_public_key(public_key) if isinstance(public_key, ec.EllipticCurvePublicKey) else b""
        name = ", ".join(str(part.value) for part in certificate.subject)
        self.app_state = {"key": self.key, "name": name}
        super().connection_made(transport)
        if not self._site_server.count(self, name):
            transport.abort()
            return
        self._watch_headers(started=True)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers(started=bool(self.conn.trailing_data[0]))

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._site_server.uncount(self)
        super().connection_lost(exc)

    def _watch_headers(self, started: bool) -> None:
        """Start the timer of a request whose headers are incomplete, or stop it."""
        if self.conn.their_state is not h11.IDLE or not started:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def send_400_response(self, msg: str) -> None:
        # Called while the error is handled. h11 knows the right status, such as 431 for headers that are too large.
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        headers = [("content-type", "text/plain"), ("connection", "close"), ("content-length", str(len(msg)))]
        with contextlib.suppress(h11.LocalProtocolError):
            for event in (
                h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES.get(status, b"")),
                h11.Data(data=msg.encode("ascii")),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class SiteServer(uvicorn.Server):
    """A server that accepts connections of sites.

    Args:
        app: the ASGI application that answers their requests.
        listener: the listening socket.
        context: the TLS settings, as `server_context` makes them.
        admission: the sites that are admitted. The connections of a site end when it is removed.
        log: receives the refusals.
    """

    def __init__(
        self, app: Any, listener: socket.socket, context: ssl.SSLContext, admission: Admission, log: RefusalLog
    ) -> None:
        config = uvicorn.Config(
            app,
            http=SiteConnection,
            ws="none",
            loop="asyncio",
            proxy_headers=False,
            server_header=False,
            # Requests must not fill the log.
            log_level="critical",
            access_log=False,
            timeout_keep_alive=IDLE_TIMEOUT_S,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        )
        super().__init__(config)
        self.log = log
        self._admission = admission
        self._context = context
        self._listener = listener
        self._tasks: set[asyncio.Task[None]] = set()
        self._handshakes: dict[asyncio.Task[None], str] = {}
        self._connections: dict[SiteConnection, bytes] = {}

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002
        await self.lifespan.startup()
        self.servers = []
        sslproto.SSLProtocol = AlertingProtocol  # type: ignore[misc]
        self._listener.setblocking(False)
        self._tasks = {asyncio.create_task(self._accept()), asyncio.create_task(self._follow_admission())}
        for task in self._tasks:
            task.add_done_callback(self._stop)
        self.started = True

    def _stop(self, task: asyncio.Task[None]) -> None:  # noqa: ARG002
        self.should_exit = True

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError:
                # The connection is gone already, or there are too many open files.
                await asyncio.sleep(0.1)
                continue
            if len(self._handshakes) >= MAX_HANDSHAKES:
                most = Counter(self._handshakes.values()).most_common(1)[0][0]
                oldest = next(task for task, other in self._handshakes.items() if other == most)
                del self._handshakes[oldest]
                oldest.cancel()
                self.log.add(f"a connection from {most}", f"{MAX_HANDSHAKES} others are in their TLS handshake")
            task = asyncio.create_task(self._handshake(connection, address[0]))
            self._handshakes[task] = address[0]
            task.add_done_callback(lambda done: self._handshakes.pop(done, None))

    async def _handshake(self, connection: socket.socket, address: str) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: SiteConnection(self),
                connection,
                ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
                ssl_shutdown_timeout=CLOSE_TIMEOUT_S,
            )
        except OSError as error:
            self.log.add(f"a connection from {address}", explain_handshake(error))

    async def _follow_admission(self) -> None:
        while True:
            await asyncio.sleep(RELOAD_S)
            admitted = {key for key in self._connections.values() if self._admission.with_key(key)}
            if self._admission.reload():
                for connection, key in list(self._connections.items()):
                    if key in admitted and self._admission.with_key(key) is None:
                        connection.transport.abort()

    def count(self, connection: SiteConnection, name: str) -> bool:
        """Count a connection, and return False if there are too many."""
        site = self._admission.with_key(connection.key)
        limit = MAX_CONNECTIONS_PER_SITE if site else MAX_CONNECTIONS_PER_STRANGER
        who = f"a connection of site {site.name}" if site else f"a connection of {name}, which is not admitted"
        own = sum(key == connection.key for key in self._connections.values())
        if own >= limit:
            self.log.add(who, f"it has {limit} connections already")
            return False
        if len(self._connections) >= MAX_CONNECTIONS:
            self.log.add(who, f"there are {MAX_CONNECTIONS} connections already")
            return False
        self._connections[connection] = connection.key
        return True

    def uncount(self, connection: SiteConnection) -> None:
        """Forget a connection that has ended."""
        self._connections.pop(connection, None)


def raise_file_limit() -> None:
    """Let this process open as many files as it may: each connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536) if hard > 0 else 65536, hard))
