"""Checks of a site on its server: is it reachable and trusted, does it know the site's key, does it refuse the site."""

import base64
import ssl
import time
from pathlib import Path

import httpx

from fedelta.errors import FedeltaError
from fedelta.federation.engines.observer import Observer
from fedelta.flower.certificates import derive_public_key
from fedelta.flower.processes import LOOPBACK
from fedelta.flower.server.gateway import KEY_HEADER, UNKNOWN_KEY

CONNECT_TIMEOUT_S = 10.0
SERVER_CHECK_S = 30.0
"""Seconds between two checks of a server that has been reached before."""
KEY_IN_USE_S = 75.0
"""Maximum seconds that the server refuses a key because of a lost node that used it.

Flower gives up a node after twice its heartbeat interval of 30 s.
"""
RETRY_S = 5.0
"""Seconds between two attempts of a node to connect."""
SERVER_POLL_S = 1.0
"""Seconds between two checks whether the server has started. Flower's nodes would wait longer each time."""


class ServerWatch:
    """Reports when the server becomes unreachable, and when it is back. The site waits in the meantime.

    Args:
        server: address of the server, as host:port.
        authority: certificate that must have signed the server's; None for plain text.
    """

    def __init__(self, server: str, authority: Path | None) -> None:
        self._server = server
        self._authority = authority
        self._last_check = time.monotonic()
        self._is_gone = False

    def check(self, observer: Observer) -> None:
        """Check the server if the last check was `SERVER_CHECK_S` seconds ago, and report a change."""
        if time.monotonic() - self._last_check < SERVER_CHECK_S:
            return
        self._last_check = time.monotonic()
        try:
            is_reachable = reachable(self._server, self._authority)
        except FedeltaError:
            # The site trusted the server before, so a different program is at its address now.
            is_reachable = False
        if is_reachable == self._is_gone:
            self._is_gone = not is_reachable
            change = "is back" if is_reachable else "is gone; waiting for it to come back (Ctrl-C ends this)"
            observer.say(f"the server at {self._server} {change}")


class Refusals:
    """Counts how long a server that knows this site's key has refused it.

    The server may still hold the place of a node with the same key that has lost its connection.

    Args:
        server: address of the server, as host:port.
        keys: folder with `site.key`.
    """

    def __init__(self, server: str, keys: Path) -> None:
        self._line = (
            f"server {server} refuses the key {keys / 'site.key'}, although it is registered: "
            "is another node using it, and do both clocks agree to a few seconds?"
        )
        self._times: list[float] = []

    def add(self, observer: Observer) -> None:
        """Record a refusal, and wait before the next attempt.

        Raises:
            FedeltaError: if the refusals have lasted longer than the server holds the place of a lost node.
        """
        now = time.monotonic()
        self._times = [then for then in self._times if now - then < 2 * KEY_IN_USE_S] + [now]
        if now - self._times[0] > KEY_IN_USE_S:
            raise FedeltaError(self._line)
        if len(self._times) == 1:
            observer.say(
                f"refused, trying again for {KEY_IN_USE_S:.0f} s: the server holds the place of a lost site that long"
            )
        time.sleep(RETRY_S)


def check_key_registered(server: str, keys: Path | None) -> None:
    """Check that the server knows this site's key.

    Does nothing if the server does not respond, or if there are no keys.

    Raises:
        FedeltaError: if the server responds that the key is not registered.
    """
    if keys is None:
        return
    key = base64.b64encode(derive_public_key(keys / "site.key")).decode()
    context = ssl.create_default_context(cafile=str(keys / "ca.crt"))
    try:
        # The request has no signature, so the server refuses it. The response says whether the key is registered.
        response = httpx.post(
            f"https://{server}/v1/fleet/pull-messages",
            headers={KEY_HEADER: key},
            verify=context,
            timeout=CONNECT_TIMEOUT_S,
            trust_env=server.rpartition(":")[0] not in LOOPBACK,
        )
    except httpx.HTTPError:
        return
    if response.text == UNKNOWN_KEY:
        raise FedeltaError(
            f"server {server} does not know the key {keys / 'site.key'}: "
            "its public key must be in the server's folder, as sites/NAME.pub"
        )


def reachable(server: str, authority: Path | None, is_retry: bool = False) -> bool:
    """Return whether the server is up and trusted.

    Args:
        server: address of the server, as host:port.
        authority: certificate that must have signed the server's; None for plain text.
        is_retry: whether an earlier response was not valid HTTP.

    Raises:
        FedeltaError: if a program that is not the trusted server listens at the address.
    """
    host, _, port = server.rpartition(":")
    scheme = "http" if authority is None else "https"
    try:
        context = ssl.create_default_context(cafile=str(authority)) if authority else False
    except ssl.SSLError as error:
        raise FedeltaError(f"{authority} is not a certificate ({error.reason})") from error
    try:
        # Any response will do: it proves that the other end uses the same protocol.
        httpx.get(
            f"{scheme}://{host}:{port}/", verify=context, timeout=CONNECT_TIMEOUT_S, trust_env=host not in LOOPBACK
        )
    except httpx.ConnectError as error:
        cause = error
        while cause is not None and not isinstance(cause, ssl.SSLError):
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        if isinstance(cause, ssl.SSLCertVerificationError):
            line = f"server {server} could not be verified with {authority}: {cause.verify_message}"
            raise FedeltaError(line) from error
        if isinstance(cause, ssl.SSLError):
            raise FedeltaError(f"server {server} does not speak TLS ({cause.reason})") from error
        return False
    except httpx.RemoteProtocolError as error:
        if not is_retry:
            # The server may have been shutting down.
            time.sleep(SERVER_POLL_S)
            return reachable(server, authority, is_retry=True)
        line = f"server {server} does not speak plain HTTP; if it uses TLS, pass --keys FOLDER"
        raise FedeltaError(line) from error
    except httpx.HTTPError:
        return False
    return True
