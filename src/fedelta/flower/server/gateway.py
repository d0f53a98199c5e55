"""The gateway between a server and the network: it terminates TLS and forwards only what the sites' nodes need.

Flower's SuperLink serves three kinds of clients on one port: the nodes, the tools that start runs and register keys,
and its own processes. Only nodes have to authenticate. So the SuperLink listens on loopback, and sites reach it through
this gateway. It forwards requests of nodes with a registered key, and refuses all others before it reads their bodies.
A route that a later version of Flower adds is closed until it is added here.

python -m fedelta.flower.server.gateway HOST PORT FOLDER SUPERLINK AUTHORITY
"""

import asyncio
import base64
import re
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fedelta.flower.certificates import read_public_key

KEY_HEADER = "flwr-public-key"
MAX_BODY = 16 * 2**20
"""Maximum size of a request in bytes. Flower splits larger messages into chunks of 5 MiB."""
BODY_TIMEOUT_S = 60.0
SUPERLINK_TIMEOUT_S = 120.0
MAX_CONNECTIONS = 1000
MAX_ADDRESSES = 1000
"""Maximum number of addresses whose refusals are counted."""
ROUTE_NAME = re.compile(r"[a-z]+(-[a-z]+)*")
REFUSED = "refused"
"""First word of each line that reports a refused node."""
UNKNOWN_KEY = "its key is not registered"
"""Body of the response to a key that is not registered."""
HOP_HEADERS = {"host", "content-length", "connection", "transfer-encoding", "keep-alive", "upgrade", "accept-encoding"}
"""Headers that describe one connection and are not forwarded."""


class Gateway:
    """The gateway as an ASGI application, in the attribute `app`.

    Args:
        superlink: address of the SuperLink, as host:port.
        authority: file with the certificate that signed the SuperLink's certificate.
        keys: public keys of the nodes that are admitted.
    """

    def __init__(self, superlink: str, authority: str, keys: Iterable[bytes]) -> None:
        self.superlink = superlink
        self.authority = authority
        self.keys = {base64.b64encode(key).decode() for key in keys}
        self.app = Starlette(
            routes=[Route("/v1/fleet/{name}", self.forward, methods=["POST"])], lifespan=self._lifespan
        )
        self._refused: dict[str, int] = {}

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

    async def forward(self, request: Request) -> Response:
        """Forward a node's request to the SuperLink, and return the response."""
        name = request.path_params["name"]
        if not ROUTE_NAME.fullmatch(name):
            return PlainTextResponse("this path is not open to sites", 404)
        if request.headers.get(KEY_HEADER) not in self.keys:
            self._log_refusal(request, "its key is not one of the registered sites'")
            return PlainTextResponse(UNKNOWN_KEY, 401)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for piece in request.stream():
                    body += piece
                    if len(body) > MAX_BODY:
                        return PlainTextResponse(f"expected at most {MAX_BODY} bytes", 413)
            headers = [(key, value) for key, value in request.headers.raw if key.decode("latin-1") not in HOP_HEADERS]
            response = await self.client.post(f"/v1/fleet/{name}", content=bytes(body), headers=headers)
        except (ClientDisconnect, TimeoutError):
            return PlainTextResponse("the request is incomplete", 408)
        except httpx.HTTPError as error:
            return PlainTextResponse(f"the SuperLink does not respond: {type(error).__name__}", 503)
        if response.status_code == 401:
            self._log_refusal(request, "its signature does not match its key and the current time; is its clock right?")
        elif response.status_code >= 400 and name in ("activate-node", "register-node"):
            self._log_refusal(request, "another node uses its key, or lost its connection less than a minute ago")
        skip = HOP_HEADERS | {"content-encoding"}
        response_headers = {key: value for key, value in response.headers.items() if key not in skip}
        return Response(response.content, response.status_code, response_headers)

    def _log_refusal(self, request: Request, reason: str) -> None:
        address = request.client.host if request.client else "an unknown address"
        if len(self._refused) > MAX_ADDRESSES:
            self._refused.clear()
        count = self._refused[address] = self._refused.get(address, 0) + 1
        # Log only the 1st, 2nd, 4th, 8th, … refusal, so that repeated requests do not fill the log.
        if count & (count - 1) == 0:
            print(f"{REFUSED} a node at {address} ({count} so far): {reason}", flush=True)


def main() -> None:
    host, port, folder, superlink, authority = sys.argv[1:]
    keys = [read_public_key(file) for file in (Path(folder) / "sites").glob("*.pub")]
    uvicorn.run(
        Gateway(superlink, authority, keys).app,
        host=host,
        port=int(port),
        ssl_certfile=str(Path(folder) / "server.crt"),
        ssl_keyfile=str(Path(folder) / "server.key"),
        # Requests from unknown senders must not fill the log.
        log_level="critical",
        access_log=False,
        limit_concurrency=MAX_CONNECTIONS,
    )


if __name__ == "__main__":
    main()
