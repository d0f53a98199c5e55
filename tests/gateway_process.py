"""A real gateway process for tests, in front of a small server that stands where the SuperLink would be."""

import base64
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedelta.flower.certificates import (
    derive_public_key,
    load_private_key,
    make_certificates,
    make_loopback_certificate,
)
from fedelta.flower.processes import free_port
from fedelta.flower.server.gateway import KEY_HEADER, SIGNATURE_HEADER, TIME_HEADER
from fedelta.flower.site.tls import site_context


class Backend(BaseHTTPRequestHandler):
    """Answers each request with its path and the length of its body; `/v1/fleet/get-fab` with 5 MiB."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        answer = bytes(5 * 2**20) if self.path.endswith("get-fab") else f"{self.path} {len(body)}".encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


class GatewayProcess:
    """A running gateway.

    Args:
        keys: folder of `make_certificates`.
        port: its port on 127.0.0.1.
        process: the process.
        log: file of its output.
    """

    def __init__(self, keys: Path, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.keys = keys
        self.port = port
        self.process = process
        self.log = log

    def connect(self, keys: Path | None = None, timeout: float = 10.0) -> ssl.SSLSocket:
        """Open a TLS connection, as the site whose folder is given, or as a stranger without a certificate."""
        context = (
            site_context(keys) if keys else ssl.create_default_context(cafile=str(self.keys / "server" / "ca.crt"))
        )
        plain = socket.create_connection(("127.0.0.1", self.port), timeout)
        return context.wrap_socket(plain, server_hostname="127.0.0.1")

    def site(self, name: str) -> Path:
        """Return the folder of a site."""
        return self.keys / "sites" / name

    def ask(self, site: str, *parts: bytes, timeout: float = 10.0) -> bytes:
        """Send parts of a request as a site, and return the response."""
        with self.connect(self.site(site), timeout) as connection:
            with suppress(OSError):
                for part in parts:
                    connection.sendall(part)
            return read_response(connection)

    def status(self, site: str, *parts: bytes, timeout: float = 10.0) -> int:
        """Send parts of a request as a site, and return the status of the response; 0 if there is none."""
        words = self.ask(site, *parts, timeout=timeout).split()
        return int(words[1]) if len(words) > 1 else 0

    @property
    def memory(self) -> float:
        """Memory of the process in MB."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6


def read_response(connection: socket.socket) -> bytes:
    """Return the bytes that a server sends until a whole response has arrived or the connection ends."""
    received = b""
    with suppress(OSError):
        while piece := connection.recv(2**16):
            received += piece
            head, end, body = received.partition(b"\r\n\r\n")
            length = next(
                (int(line[15:]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"), 0
            )
            if end and not head.startswith(b"HTTP/1.1 100") and len(body) >= length:
                break
    return received


def signature(key: Path, ahead: float = 0.0, named: Path | None = None) -> bytes:
    """Return the headers that a node signs its requests with.

    Args:
        key: file of its private key.
        ahead: seconds that its clock is ahead.
        named: file of the key that it names, if that is not its own.
    """
    private = load_private_key(key)
    stamp = (datetime.now(UTC) + timedelta(seconds=ahead)).isoformat()
    signed = private.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    values = {
        KEY_HEADER: base64.b64encode(derive_public_key(named or key)).decode(),
        SIGNATURE_HEADER: base64.b64encode(signed).decode(),
        TIME_HEADER: stamp,
    }
    return "".join(f"{name}: {value}\r\n" for name, value in values.items()).encode()


def request(headers: bytes, length: int | None = 0, path: str = "/v1/fleet/pull-messages") -> bytes:
    """Return the head of a POST request."""
    size = b"" if length is None else f"content-length: {length}\r\n".encode()
    return f"POST {path} HTTP/1.1\r\nhost: gateway\r\n".encode() + size + headers + b"\r\n"


@contextmanager
def gateway(folder: Path, sites: list[str]) -> Iterator[GatewayProcess]:
    """Run a gateway for these sites.

    Args:
        folder: a new folder for keys and the log.
        sites: names of the sites.
    """
    keys = folder / "keys"
    make_certificates(keys, sites, [])
    certificate = make_loopback_certificate(folder / "loopback")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "server.crt", certificate / "server.key")
    backend = ThreadingHTTPServer(("127.0.0.1", 0), Backend)
    backend.socket = context.wrap_socket(backend.socket, server_side=True)
    threading.Thread(target=backend.serve_forever, daemon=True).start()
    port, log = free_port(), folder / "gateway.log"
    superlink = f"127.0.0.1:{backend.server_port}"
    module = "fedelta.flower.server.gateway"
    arguments = ["127.0.0.1", str(port), str(keys / "server"), superlink, str(certificate / "ca.crt")]
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=output, stderr=output)
    try:
        until = time.monotonic() + 60
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        yield GatewayProcess(keys, port, process, log)
    finally:
        process.terminate()
        process.wait(20)
        backend.shutdown()
