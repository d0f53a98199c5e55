"""The gateway between a server and the network: it terminates TLS and forwards only what the sites' nodes need.

Flower's SuperLink serves three kinds of clients on one port: the nodes, the tools that start runs and register keys,
and its own processes. Only nodes have to authenticate. So the SuperLink listens on loopback, and sites reach it through
this gateway. A request is forwarded if all of this holds; each is checked before the body is read:

- its sender has a certificate of the federation's authority. The TLS handshake refuses all others,
- the key in that certificate is the key of an admitted site, and the key that the request names. So a site cannot use
  the key of another, and a key that is known but not owned is worth nothing,
- its signature is that key's, over the time of this moment,
- its path is one of the nodes'. A route that a later version of Flower adds is closed until it is added here,
- its headers, its body and its site's other requests are within limits.

python -m fedelta.flower.server.gateway HOST PORT FOLDER SUPERLINK AUTHORITY
"""

import asyncio
import base64
import binascii
import re
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from fedelta.flower.server.admission import Admission, AdmittedSite
from fedelta.flower.server.byte_budget import ByteBudget, Pace
from fedelta.flower.server.connections import SiteServer, raise_file_limit, server_context
from fedelta.flower.server.refusals import RefusalLog

KEY_HEADER, SIGNATURE_HEADER, TIME_HEADER = "flwr-public-key", "flwr-signature", "flwr-timestamp"
MAX_BODY = 16 * 2**20
"""Maximum size of a request in bytes. Flower splits larger messages into chunks of 5 MiB."""
MAX_BODIES = 96 * 2**20
"""Maximum size in bytes of all requests that are in memory."""
MAX_REQUESTS_PER_SITE = 8
RATE_PER_SITE, BURST_PER_SITE = 20.0, 100
"""Requests per second of a site, and how many may come at once. A node sends about four per second."""
FAILURE_COST = 10
"""Number of requests that one counts for if the SuperLink refuses it."""
MAX_HEADERS = 64
PIECE = 256 * 2**10
"""Bytes of a body that are encrypted for the SuperLink at a time, so that its memory is not needed twice."""
BODY_TIMEOUT_S = 60.0
MIN_BODY_RATE = 64 * 2**10
"""Bytes per second that extend `BODY_TIMEOUT_S`, which also limits the time of a response."""
SUPERLINK_TIMEOUT_S = 120.0
MAX_CLOCK_AHEAD_S, MAX_AGE_S = 5.0, 305.0
"""How far the time stamp of a request may be from this clock, as in Flower."""
NODE_PATH = re.compile(r"/v1/fleet/([a-z]+(?:-[a-z]+)*)")
UNKNOWN_KEY = "its key is not registered"
"""Body of the response to a key that is not admitted."""
HOP_HEADERS = {"host", "content-length", "connection", "transfer-encoding", "keep-alive", "upgrade", "accept-encoding"}
"""Headers that describe one connection and are not forwarded."""
CLOSE = {"connection": "close"}


class Refused(Exception):
    """A request that is not forwarded.

    Args:
        status: HTTP status of the response.
        text: body of the response.
        reason: what the server reports; empty if it is not worth a line.
        detail: appended to the reason.
    """

    def __init__(self, status: int, text: str, reason: str = "", detail: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.reason = reason
        self.detail = detail


class Gateway:
    """The gateway as an ASGI application, in the attribute `app`.

    Args:
        superlink: address of the SuperLink, as host:port.
        authority: file with the certificate that signed the SuperLink's certificate.
        admission: the sites that are admitted.
        log: receives the refusals.
    """

    def __init__(self, superlink: str, authority: str, admission: Admission, log: RefusalLog) -> None:
        self.superlink = superlink
        self.authority = authority
        self._admission = admission
        self._log = log
        self._budget = ByteBudget(MAX_BODIES, MAX_BODY, MAX_REQUESTS_PER_SITE)
        self._pace = Pace(RATE_PER_SITE, BURST_PER_SITE)
        self.app = Starlette(routes=[Mount("/", self._respond)], lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:  # noqa: ARG002
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=f"https://{self.superlink}",
            verify=self.authority,
            timeout=SUPERLINK_TIMEOUT_S,
            limits=limits,
            trust_env=False,
        ) as self.client:
            yield

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            response = await self.handle(request)
        except Refused as refusal:
            who = f"{request.state.name!r} at {request.client.host if request.client else 'an unknown address'}"
            if refusal.reason:
                self._log.add(f"a request of {who}", refusal.reason, refusal.detail)
            # A site that sends what is refused has to connect again, which slows it down.
            response = PlainTextResponse(str(refusal), refusal.status, CLOSE)
        await response(scope, receive, send)

    async def handle(self, request: Request) -> Response:
        """Forward a node's request to the SuperLink, and return the response.

        Raises:
            Refused: if it is not forwarded.
        """
        size = _body_size(request)
        site = self._find_site(request)
        await self._pace.wait(site.name)
        _check_sender(request, site)
        if request.method != "POST" or not (path := NODE_PATH.fullmatch(request.scope["path"])):
            raise Refused(404, "this path is not open to sites")
        return await self._forward(request, site, path[1], size)

    def _find_site(self, request: Request) -> AdmittedSite:
        """Return the admitted site whose certificate the sender has."""
        if (site := self._admission.with_key(request.state.key)) is None:
            raise Refused(401, UNKNOWN_KEY, "its key is not one of the admitted sites' (sites/NAME.pub)")
        return site

    async def _forward(self, request: Request, site: AdmittedSite, name: str, size: int) -> Response:
        allowed_s = BODY_TIMEOUT_S + size / MIN_BODY_RATE
        async with self._budget.reserve(site.name, size):
            body = bytearray()
            try:
                async with asyncio.timeout(allowed_s):
                    async for piece in request.stream():
                        body += piece
            except (ClientDisconnect, TimeoutError):
                raise Refused(408, "the request is incomplete", "it did not finish a request in time") from None
            headers = [(key, value) for key, value in request.headers.raw if key.decode("latin-1") not in HOP_HEADERS]
            # The response is passed on as it is, so it must not be compressed for the gateway.
            headers += [(b"content-length", str(len(body)).encode()), (b"accept-encoding", b"identity")]
            outgoing = self.client.build_request("POST", f"/v1/fleet/{name}", content=_pieces(body), headers=headers)
            try:
                response = await self.client.send(outgoing, stream=True)
            except httpx.HTTPError as error:
                text = f"the SuperLink does not respond: {type(error).__name__}"
                return PlainTextResponse(text, 503)
        if response.status_code >= 400:
            self._pace.count(site.name, FAILURE_COST)
        if response.status_code >= 400 and name in ("activate-node", "register-node"):
            reason = "another node uses its key, or lost its connection less than a minute ago"
            self._log.add(f"site {site.name}", reason)
        return Answer(response)


class Answer(StreamingResponse):
    """A response of the SuperLink, passed on as fast as the site reads it and within a time limit.

    Args:
        response: the response, whose body has not been read.
    """

    def __init__(self, response: httpx.Response) -> None:
        headers = {key: value for key, value in response.headers.items() if key not in HOP_HEADERS | {"date", "server"}}
        if length := response.headers.get("content-length"):
            headers["content-length"] = length
        super().__init__(response.aiter_raw(), response.status_code, headers)
        self._response = response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = int(self._response.headers.get("content-length") or MAX_BODY)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S + size / MIN_BODY_RATE):
                await super().__call__(scope, receive, send)
        finally:
            await self._response.aclose()


async def _pieces(body: bytearray) -> AsyncIterator[bytes]:
    for start in range(0, len(body), PIECE):
        yield bytes(memoryview(body)[start : start + PIECE])


def _check_sender(request: Request, site: AdmittedSite) -> None:
    """Raise Refused if a request does not name the site's own key, or is not signed with it at this moment."""
    named = request.headers.get(KEY_HEADER)
    if named is None:
        # A site that only checks the connection and the clocks. That is not worth a line.
        raise Refused(401, "the request is not signed")
    if named != base64.b64encode(site.encoded).decode():
        raise Refused(401, "the key is not that of the certificate", "it names a key that is not its own")
    check_signature(site.key, request.headers, datetime.now(UTC))


def _body_size(request: Request) -> int:
    """Return the size of a request's body.

    Raises:
        Refused: if it is too large or not stated, or there are too many headers.
    """
    headers = request.headers
    if len(headers.raw) > MAX_HEADERS:
        raise Refused(431, f"expected at most {MAX_HEADERS} headers", f"it sent more than {MAX_HEADERS} headers")
    if "transfer-encoding" in headers:
        # A chunk may be a single byte, whose processing takes more time than its transfer.
        raise Refused(411, "expected a body with its length", "it sent a body without its length")
    size = int(headers.get("content-length", 0))
    if size > MAX_BODY:
        raise Refused(413, f"expected at most {MAX_BODY} bytes", f"it sent more than {MAX_BODY} bytes")
    return size


def check_signature(key: ec.EllipticCurvePublicKey, headers: Mapping[str, str], now: datetime) -> None:
    """Check that a request is signed by a key at this moment, as Flower's SuperLink does.

    Args:
        key: the public key.
        headers: headers of the request, with a time stamp and a signature over it.
        now: the time by this machine's clock.

    Raises:
        Refused: if it is not. The reason says how far the clocks are apart, if that is why.
    """
    try:
        stamp = headers[TIME_HEADER]
        age = (now - datetime.fromisoformat(stamp)).total_seconds()
        signature = base64.b64decode(headers[SIGNATURE_HEADER], validate=True)
        key.verify(signature, stamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    except (KeyError, ValueError, TypeError, binascii.Error, InvalidSignature):
        raise Refused(401, "the signature is not valid", "its signature does not match its key") from None
    if not -MAX_CLOCK_AHEAD_S < age < MAX_AGE_S:
        difference = f"{abs(age):.0f} s {'behind' if age > 0 else 'ahead of'}"
        text = f"the time stamp is {difference} the server's clock"
        raise Refused(401, text, "the time stamp of its request is not of this moment", f": {difference} this clock")


def main() -> None:
    host, port, folder, superlink, authority = sys.argv[1:]
    raise_file_limit()
    admission, log = Admission(Path(folder) / "sites"), RefusalLog()
    app = Gateway(superlink, authority, admission, log).app
    with socket.create_server((host, int(port)), backlog=1024) as listener:
        SiteServer(app, listener, server_context(Path(folder)), admission, log).run()


if __name__ == "__main__":
    main()
