"""A SuperNode that identifies itself with the site's certificate, and polls for messages about three times a second.

Flower's own SuperNode has no option for a certificate, and polls every three seconds.

python -m fedelta.flower.site.supernode KEYS [the arguments of flower-supernode]

KEYS is the site's folder with its key and certificate, or empty for plain text.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedelta.errors import FedeltaError
from fedelta.flower.site.tls import site_context

POLL_S = 0.3
REQUEST_TIMEOUT_S = 60.0
IDLE_CONNECTION_S = 60.0
"""Seconds that an idle connection stays open. A new one would have to wait if strangers flood the server."""


def _sleep(seconds: float) -> None:
    time.sleep(min(seconds, POLL_S))


def use_certificate(keys: Path) -> None:
    """Let Flower's client identify itself to the server with the site's certificate.

    Args:
        keys: the site's folder, with `site.key`, `site.crt` and `ca.crt`.

    Raises:
        FedeltaError: if a file is missing or damaged, or this version of Flower connects in another way.
    """
    context = site_context(keys)
    if getattr(fleet_http_connection, "FleetHttpClient", None) is not FleetHttpClient:
        raise FedeltaError("this version of Flower connects in another way, expected flwr 1.41 or 1.42")

    class SiteClient(FleetHttpClient):
        def __init__(self, base_url: str, **options: Any) -> None:
            super().__init__(base_url, **{**options, "verify": context})
            limits = httpx.Limits(keepalive_expiry=IDLE_CONNECTION_S)
            self._client: httpx.Client = httpx.Client(verify=context, timeout=REQUEST_TIMEOUT_S, limits=limits)

    fleet_http_connection.FleetHttpClient = SiteClient


if __name__ == "__main__":
    # If a later version of Flower lacks this attribute, the node still works, at Flower's own speed.
    if hasattr(start_client_internal, "time"):
        start_client_internal.time = SimpleNamespace(**{**vars(time), "sleep": _sleep})
    if keys_folder := sys.argv.pop(1):
        try:
            use_certificate(Path(keys_folder))
        except FedeltaError as error:
            sys.exit(str(error))
    flower_supernode()
