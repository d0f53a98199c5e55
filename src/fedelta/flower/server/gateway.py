"""The one door of a server to the network: TLS, and nothing but what the nodes of its sites need.

Flower's SuperLink answers nodes, whoever starts runs and registers keys, and its own processes, all on one port, and
asks only nodes who they are. So it listens on loopback, and sites reach it through this: requests of nodes with a
registered key are handed on, all others refused before they are read. Whatever Flower may add is behind the door until
it is let out.

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

from fedelta.flower.certificates import public_key

KEY_HEADER = "flwr-public-key"
MOST = 16 * 2**20
"""Bytes of a request at most; Flower cuts what is larger into pieces of 5 MiB."""
BODY_S = 60.0
PATIENCE_S = 120.0
CONNECTIONS = 1000
ADDRESSES = 1000
NAME = re.compile(r"[a-z]+(-[a-z]+)*")
REFUSED = "refused"
UNKNOWN = "its key is not registered"
OF_ONE_HOP = {"host", "content-length", "connection", "transfer-encoding", "keep-alive", "upgrade", "accept-encoding"}


class Gateway:
    """The application.

    Args:
        superlink: its address.
        authority: file with the certificate that the SuperLink's is signed by.
        keys: public keys of those who may come in.
    """

    def __init__(self, superlink: str, authority: str, keys: Iterable[bytes]) -> None:
        self.superlink = superlink
        self.authority = authority
        self.keys = {base64.b64encode(key).decode() for key in keys}
        self.app = Starlette(
            routes=[Route("/v1/fleet/{name}", self.hand_on, methods=["POST"])], lifespan=self._lifespan
        )
        self._refused: dict[str, int] = {}

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:  # noqa: ARG002
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=f"https://{self.superlink}",
            verify=self.authority,
            timeout=PATIENCE_S,
            limits=limits,
            trust_env=False,
        ) as self.client:
            yield

    async def hand_on(self, request: Request) -> Response:
        """One request of a node, and the SuperLink's answer."""
        name = request.path_params["name"]
        if not NAME.fullmatch(name):
            return PlainTextResponse("nothing of the sites' is there", 404)
        if request.headers.get(KEY_HEADER) not in self.keys:
            self._say(request, "its key is not one of the registered sites'")
            return PlainTextResponse(UNKNOWN, 401)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for piece in request.stream():
                    body += piece
                    if len(body) > MOST:
                        return PlainTextResponse(f"expected at most {MOST} bytes", 413)
            headers = [(key, value) for key, value in request.headers.raw if key.decode("latin-1") not in OF_ONE_HOP]
            answer = await self.client.post(f"/v1/fleet/{name}", content=bytes(body), headers=headers)
        except (ClientDisconnect, TimeoutError):
            return PlainTextResponse("the request did not come to its end", 408)
        except httpx.HTTPError as error:
            return PlainTextResponse(f"the SuperLink does not answer: {type(error).__name__}", 503)
        if answer.status_code == 401:
            self._say(request, "its signature is not of its key and of this moment; is its clock right?")
        elif answer.status_code >= 400 and name in ("activate-node", "register-node"):
            self._say(request, "another node is there with its key, or was cut off less than a minute ago")
        kept = {key: value for key, value in answer.headers.items() if key not in OF_ONE_HOP | {"content-encoding"}}
        return Response(answer.content, answer.status_code, kept)

    def _say(self, request: Request, why: str) -> None:
        where = request.client.host if request.client else "nowhere"
        if len(self._refused) > ADDRESSES:
            self._refused.clear()
        count = self._refused[where] = self._refused.get(where, 0) + 1
        # Nobody makes the log grow by knocking again and again.
        if count & (count - 1) == 0:
            print(f"{REFUSED} a node at {where} ({count} so far): {why}", flush=True)


def main() -> None:
    host, port, folder, superlink, authority = sys.argv[1:]
    keys = [public_key(file) for file in (Path(folder) / "sites").glob("*.pub")]
    uvicorn.run(
        Gateway(superlink, authority, keys).app,
        host=host,
        port=int(port),
        ssl_certfile=str(Path(folder) / "server.crt"),
        ssl_keyfile=str(Path(folder) / "server.key"),
        # What strangers send must not fill the log.
        log_level="critical",
        access_log=False,
        limit_concurrency=CONNECTIONS,
    )


if __name__ == "__main__":
    main()
