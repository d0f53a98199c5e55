"""Checks of a site on its server: is it reachable and trusted, does it know the site, does it refuse the site."""

import socket
import ssl
import time
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from fedelta.errors import FedeltaError
from fedelta.federation.engines.observer import Observer
from fedelta.flower.processes import LOOPBACK
from fedelta.flower.server.gateway import MAX_AGE_S, MAX_CLOCK_AHEAD_S, UNKNOWN_KEY
from fedelta.flower.site.tls import site_context

CONNECT_TIMEOUT_S = 10.0
ALERT_TIMEOUT_S = 2.0
"""Seconds to wait for the reason why the server refuses a certificate."""
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
ALERTS = {
    "CERTIFICATE_REQUIRED": "it requires a certificate, and got none",
    "UNKNOWN_CA": "its authority (ca.crt in the server's folder) has not signed it",
    "CERTIFICATE_EXPIRED": "it says that it has expired or is not valid yet; do both clocks agree?",
    "CERTIFICATE_REVOKED": "it has been revoked",
}
"""End of the name of an alert with which a server refuses a certificate → what it means."""


class ServerWatch:
    """Reports when the server becomes unreachable, and when it is back. The site waits in the meantime.

    Args:
        server: address of the server, as host:port.
        keys: the site's folder, with its key and certificate; None for plain text.
    """

    def __init__(self, server: str, keys: Path | None) -> None:
        self._server = server
        self._keys = keys
        self._last_check = time.monotonic()
        self._is_gone = False

    def check(self, observer: Observer) -> None:
        """Check the server if the last check was `SERVER_CHECK_S` seconds ago, and report a change."""
        if time.monotonic() - self._last_check < SERVER_CHECK_S:
            return
        self._last_check = time.monotonic()
        reason = f"the server at {self._server} is gone; waiting for it to come back (Ctrl-C ends this)"
        try:
            is_reachable = reachable(self._server, self._keys)
        except FedeltaError as error:
            # Another program is at the server's address now, or a certificate has expired.
            is_reachable, reason = False, str(error)
        if is_reachable == self._is_gone:
            self._is_gone = not is_reachable
            observer.say(f"the server at {self._server} is back" if is_reachable else reason)


class Refusals:
    """Counts how long a server that admits this site has refused its node.

    The server may still hold the place of a node with the same key that has lost its connection.

    Args:
        server: address of the server, as host:port.
        keys: folder with `site.key`.
    """

    def __init__(self, server: str, keys: Path) -> None:
        self._line = (
            f"server {server} refuses the key {keys / 'site.key'}, although it is registered: is another node using it?"
        )
        self._times: list[float] = []

    def add(self, observer: Observer, forgotten: bool = False) -> None:
        """Record a refusal, and wait before the next attempt.

        Args:
            observer: is told about the first refusal.
            forgotten: whether the node had been accepted before, so that the server must have restarted.

        Raises:
            FedeltaError: if the refusals have lasted longer than the server holds the place of a lost node.
        """
        now = time.monotonic()
        self._times = [then for then in self._times if now - then < 2 * KEY_IN_USE_S] + [now]
        if now - self._times[0] > KEY_IN_USE_S:
            raise FedeltaError(self._line)
        if len(self._times) == 1:
            why = f"refused, trying again for {KEY_IN_USE_S:.0f} s: the server holds the place of a lost site that long"
            observer.say("the server has restarted; connecting again" if forgotten else why)
        time.sleep(SERVER_POLL_S if forgotten else RETRY_S)


def check_admitted(server: str, keys: Path | None) -> None:
    """Check that the server admits this site, and that both clocks agree.

    Does nothing if the server does not respond, or if there are no keys.

    Raises:
        FedeltaError: if the server responds that it does not admit the site, or its clock shows another time.
    """
    if keys is None:
        return
    sent = datetime.now(UTC)
    try:
        # The request has no signature, so the server refuses it. The response says whether it admits the site.
        response = httpx.get(
            f"https://{server}/",
            verify=site_context(keys),
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
    with suppress(KeyError, ValueError, TypeError):
        check_clock(parsedate_to_datetime(response.headers["date"]), sent, datetime.now(UTC), server)


def check_clock(stamp: datetime, sent: datetime, received: datetime, server: str) -> None:
    """Check that a server will accept the time stamps of this machine's clock.

    Args:
        stamp: the server's time when it responded, without fractions of a second.
        sent, received: this machine's time before the request and after the response, which may have taken long.
        server: address of the server.

    Raises:
        FedeltaError: if the clocks certainly differ by more than Flower accepts.
    """
    ahead, behind = (sent - stamp).total_seconds() - 1, (stamp - received).total_seconds()
    if ahead > MAX_CLOCK_AHEAD_S or behind > MAX_AGE_S:
        difference = f"{ahead:.0f} s ahead of" if ahead > 0 else f"{behind:.0f} s behind"
        raise FedeltaError(
            f"the clock of this machine is {difference} that of server {server}; "
            f"expected at most {MAX_CLOCK_AHEAD_S:.0f} s ahead and {MAX_AGE_S:.0f} s behind"
        )


def reachable(server: str, keys: Path | None, is_retry: bool = False) -> bool:
    """Return whether the server is up and trusted, and accepts the site's certificate.

    Args:
        server: address of the server, as host:port.
        keys: the site's folder, with its key and certificate; None for plain text.
        is_retry: whether an earlier response was not valid HTTP.

    Raises:
        FedeltaError: if a program that is not the trusted server listens at the address, or it refuses the certificate.
    """
    host, _, port = server.rpartition(":")
    scheme = "https" if keys else "http"
    context = site_context(keys) if keys else None
    try:
        # Any response will do: it proves that the other end uses the same protocol.
        httpx.get(
            f"{scheme}://{host}:{port}/",
            verify=context or False,
            timeout=CONNECT_TIMEOUT_S,
            trust_env=host not in LOOPBACK,
        )
    except httpx.HTTPError as error:
        if keys is not None and (line := explain_tls(error, server, keys)):
            raise FedeltaError(line) from error
        if context is not None and (alert := _read_alert(host, int(port), context)):
            raise FedeltaError(f"server {server} refuses the certificate {keys / 'site.crt'}: {alert}") from error  # type: ignore[operator]
        if isinstance(error, httpx.RemoteProtocolError):
            if not is_retry:
                # The server may have been shutting down.
                time.sleep(SERVER_POLL_S)
                return reachable(server, keys, is_retry=True)
            if keys is None:
                line = f"server {server} does not speak plain HTTP; if it uses TLS, pass --keys FOLDER"
                raise FedeltaError(line) from error
        return False
    return True


def explain_tls(error: BaseException, server: str, keys: Path) -> str:
    """Return why a server is not trusted or does not speak TLS; empty if the error has another cause."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        clock = ""
        if cause.verify_code in (9, 10):  # not valid yet, expired
            clock = f"; the clock of this machine says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, is it right?"
        return f"server {server} could not be verified with {keys / 'ca.crt'}: {cause.verify_message}{clock}"
    if isinstance(cause, ssl.SSLError):
        if meaning := _meaning(cause):
            return f"server {server} refuses the certificate {keys / 'site.crt'}: {meaning}"
        if isinstance(error, httpx.ConnectError):
            return f"server {server} does not speak TLS ({cause.reason})"
    return ""


def _meaning(error: ssl.SSLError) -> str:
    """Return what an alert of the server means; empty if the error is not an alert about a certificate."""
    reason = error.reason or ""
    if "ALERT" not in reason:
        return ""
    return next((text for end, text in ALERTS.items() if reason.endswith(end)), reason.lower().replace("_", " "))


def _read_alert(host: str, port: int, context: ssl.SSLContext) -> str:
    """Connect, send nothing, and return why the server ends the connection; empty if it does not or does not say.

    A server reads the site's certificate only after the site believes that the handshake has succeeded. If the site
    sends a request at that moment, the server's reason may be lost.
    """
    try:
        with (
            socket.create_connection((host, port), CONNECT_TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as connection,
        ):
            connection.settimeout(ALERT_TIMEOUT_S)
            connection.recv(1)
    except ssl.SSLError as error:
        return _meaning(error)
    except OSError:
        pass
    return ""
