"""The one door of a server to the network: TLS, and nothing but what nodes need.

Flower's SuperLink answers nodes, whoever starts runs and registers keys, and its own processes, all on one port, and
asks only nodes who they are. So it listens on loopback, and sites reach it through this: requests of nodes are handed
on, all others refused. Whatever Flower may add is behind the door until it is let out.

python -m fedelta.engines.flower.front_door HOST PORT FOLDER SUPERLINK AUTHORITY
"""

import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

MOST = 64 * 2**20
"""Bytes of a request at most; Flower cuts what is larger into pieces of 5 MiB."""
PATIENCE_S = 120.0
NAME = re.compile(r"[a-z]+(-[a-z]+)*")
REFUSED = (401, 403)
OF_ONE_HOP = {"host", "content-length", "connection", "transfer-encoding", "keep-alive", "upgrade"}


def door(superlink: str, authority: str) -> Starlette:
    """The application.

    Args:
        superlink: its address.
        authority: file with the certificate that the SuperLink's is signed by.
    """

    refused: dict[str, int] = {}

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=f"https://{superlink}", verify=authority, timeout=PATIENCE_S, limits=limits
        ) as client:
            app.state.superlink = client
            yield

    async def hand_on(request: Request) -> Response:
        name = request.path_params["name"]
        if not NAME.fullmatch(name):
            return PlainTextResponse("nothing of the sites' is there", 404)
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MOST:
                return PlainTextResponse(f"expected at most {MOST} bytes", 413)
        headers = {key: value for key, value in request.headers.items() if key not in OF_ONE_HOP}
        try:
            answer = await request.app.state.superlink.post(f"/v1/fleet/{name}", content=bytes(body), headers=headers)
        except httpx.HTTPError as error:
            return PlainTextResponse(f"the SuperLink does not answer: {type(error).__name__}", 503)
        entering = name in ("activate-node", "register-node") and answer.status_code >= 400
        if (entering or answer.status_code in REFUSED) and request.client is not None:
            # Nobody makes this log grow by knocking again and again.
            refused[request.client.host] = refused.get(request.client.host, 0) + 1
            if (count := refused[request.client.host]) & (count - 1) == 0:
                where = f"{request.client.host} ({name}, {count} so far)"
                print(f"refused a node at {where}: its key is not one of the registered sites'", flush=True)
        kept = {key: value for key, value in answer.headers.items() if key not in OF_ONE_HOP | {"content-encoding"}}
        return Response(answer.content, answer.status_code, kept)

    return Starlette(routes=[Route("/v1/fleet/{name}", hand_on, methods=["POST"])], lifespan=lifespan)


def main() -> None:
    host, port, folder, superlink, authority = sys.argv[1:]
    uvicorn.run(
        door(superlink, authority),
        host=host,
        port=int(port),
        ssl_certfile=str(Path(folder) / "server.crt"),
        ssl_keyfile=str(Path(folder) / "server.key"),
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()
