"""The gateway, over real TLS connections: whom it lets in, and what a site or a stranger can cost it."""

import shutil
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

from fedelta.flower import authority as authority_module
from fedelta.flower.authority import PEM, Authority
from fedelta.flower.certificates import load_public_key, make_certificates
from fedelta.flower.server.gateway import MAX_BODY, MAX_HEADERS
from fedelta.flower.signing import add_sites
from fedelta.flower.site import server_checks
from fedelta.flower.site.server_checks import check_admitted, reachable
from gateway_process import GatewayProcess, gateway, read_response, request, signature

MAX_MEMORY_MB = 300
FETCH = "/v1/fleet/get-fab"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with gateway(tmp_path_factory.mktemp("gateway"), ["north", "south", "west"]) as process:
        yield process
        assert process.process.poll() is None, process.log.read_text()
        assert process.memory < MAX_MEMORY_MB


def signed(running: GatewayProcess, site: str = "north") -> bytes:
    return signature(running.site(site) / "site.key")


def serves(running: GatewayProcess, site: str = "south") -> bool:
    """Return whether the gateway forwards a request within a second or two."""
    start = time.monotonic()
    answer = running.ask(site, request(signed(running, site), 3), b"abc")
    return answer.endswith(b"/v1/fleet/pull-messages 3") and time.monotonic() - start < 5


def test_a_request_of_a_site_is_forwarded(running: GatewayProcess) -> None:
    body = bytes(5 * 2**20)
    assert running.ask("north", request(signed(running), len(body)), body).endswith(b" 5242880")
    assert len(running.ask("north", request(signed(running), 0, FETCH))) > 5 * 2**20
    with running.connect(running.site("north")) as connection:
        for _ in range(3):
            connection.sendall(request(signed(running), 1) + b"x")
            assert read_response(connection).endswith(b" 1")


@pytest.mark.parametrize("peer", ["no certificate", "another authority", "the server's certificate", "plain text"])
def test_a_stranger_never_reaches_http(peer: str, running: GatewayProcess, tmp_path: Path) -> None:
    make_certificates(tmp_path / "keys", ["north"], [])
    context = ssl.create_default_context(cafile=str(running.keys / "server" / "ca.crt"))
    if peer == "another authority":
        other = tmp_path / "keys" / "server"
        context.load_cert_chain(other / "server.crt", other / "server.key")
    elif peer == "the server's certificate":
        own = running.keys / "server"
        context.load_cert_chain(own / "server.crt", own / "server.key")
    received = b""
    with socket.create_connection(("127.0.0.1", running.port), 10) as plain, suppress(OSError):
        connection = plain if peer == "plain text" else context.wrap_socket(plain, server_hostname="127.0.0.1")
        connection.sendall(request(signed(running)))
        received = connection.recv(100)
    assert b"HTTP" not in received
    assert serves(running)


def test_a_site_cannot_use_the_key_of_another_or_a_signature_of_another_moment(running: GatewayProcess) -> None:
    own, other = (running.site(site) / "site.key" for site in ("north", "south"))
    assert running.status("north", request(signature(own, named=other))) == 401
    assert running.status("north", request(signature(other))) == 401
    assert running.status("north", request(signature(own).replace(b"signature: M", b"signature: N"))) == 401
    assert running.status("north", request(b"")) == 401
    late = running.ask("north", request(signature(own, ahead=-400)))
    assert b" 401 " in late
    assert b"400 s behind the server's clock" in late
    assert running.status("north", request(signature(own, ahead=-250))) == 200
    assert "not of this moment: 400 s behind this clock" in running.log.read_text()


@pytest.mark.parametrize(
    ("status", "head", "body"),
    [
        (404, "POST /v1/control/list-runs HTTP/1.1", b""),
        (404, "POST /v1/fleet/../control/list-runs HTTP/1.1", b""),
        (404, "POST /v1/fleet/%2e%2e/control/list-runs HTTP/1.1", b""),
        (404, "POST /v1/runtime/acquire-task HTTP/1.1", b""),
        (404, "GET /v1/fleet/pull-messages HTTP/1.1", b""),
        (404, "DELETE /v1/fleet/pull-messages HTTP/1.1", b""),
        (411, "POST /v1/fleet/pull-messages HTTP/1.1\r\ntransfer-encoding: chunked", b"1\r\nx\r\n" * 1000),
        (413, f"POST /v1/fleet/pull-messages HTTP/1.1\r\ncontent-length: {MAX_BODY + 1}", bytes(10)),
        (413, f"POST /v1/fleet/pull-messages HTTP/1.1\r\ncontent-length: {10**18}", bytes(10)),
        (400, f"POST /v1/fleet/pull-messages HTTP/1.1\r\ncontent-length: {10**30}", bytes(10)),
        (400, "POST /v1/fleet/pull-messages HTTP/1.1\r\ncontent-length: -1", bytes(10)),
        (400, "POST /v1/fleet/pull-messages HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2", bytes(10)),
        (431, "POST /v1/fleet/pull-messages HTTP/1.1" + "\r\na: b" * (MAX_HEADERS + 1), b""),
        (431, "POST /v1/fleet/pull-messages HTTP/1.1\r\na: " + "b" * 2**20, b""),
        (431, "POST /" + "b" * 2**20, b""),
        (200, "POST /v1/fleet/pull-messages HTTP/1.0\r\ncontent-length: 1", b"x"),
    ],
)
def test_a_request_outside_the_limits_ends_its_connection(
    status: int, head: str, body: bytes, running: GatewayProcess
) -> None:
    lines = head.encode() + b"\r\nhost: gateway\r\n" + signed(running) + b"\r\n"
    with running.connect(running.site("north")) as connection:
        with suppress(OSError):
            connection.sendall(lines + body)
        received = read_response(connection)
        assert int(received.split()[1]) == status
        with suppress(OSError):
            assert connection.recv(1) == b""
    assert serves(running)


def test_an_expected_body_is_asked_for_and_a_refused_one_is_not(running: GatewayProcess) -> None:
    expect = b"expect: 100-continue\r\n"
    with running.connect(running.site("north")) as connection:
        connection.sendall(request(signed(running) + expect, 3))
        assert connection.recv(1000).startswith(b"HTTP/1.1 100")
        connection.sendall(b"abc")
        assert read_response(connection).endswith(b" 3")
    assert running.status("north", request(signed(running) + expect, MAX_BODY + 1)) == 413


def test_pipelined_requests_are_answered_one_after_another(running: GatewayProcess) -> None:
    with running.connect(running.site("north")) as connection:
        connection.sendall((request(signed(running), 1) + b"x") * 20)
        received = b""
        while received.count(b"/v1/fleet/pull-messages 1") < 20:
            received += (piece := connection.recv(2**16))
            assert piece, received


def test_many_large_bodies_wait_for_memory_and_other_sites_are_served(running: GatewayProcess) -> None:
    with ExitStack() as stack:
        for _ in range(12):
            connection = stack.enter_context(running.connect(running.site("north"), timeout=0.2))
            with suppress(OSError):
                # All of the body but its last byte.
                connection.sendall(request(signed(running), MAX_BODY) + bytes(MAX_BODY - 1))
        assert running.memory < MAX_MEMORY_MB
        assert serves(running)
        body = bytes(10 * 2**20)
        assert running.status("south", request(signed(running, "south"), len(body)), body) == 200


def test_a_site_that_never_reads_its_responses_costs_little(running: GatewayProcess) -> None:
    with ExitStack() as stack:
        for _ in range(12):
            connection = stack.enter_context(running.connect(running.site("north")))
            connection.sendall(request(signed(running), 0, FETCH))
        time.sleep(1)
        assert running.memory < MAX_MEMORY_MB / 2
        assert serves(running)


def test_a_site_has_few_connections_at_a_time(running: GatewayProcess) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(running.connect(running.site("west"))) for _ in range(20)]
        time.sleep(0.3)
        ended = 0
        for connection in connections:
            connection.settimeout(0.05)
            with suppress(TimeoutError):
                with suppress(ConnectionError):
                    connection.recv(1)
                ended += 1
        assert ended == 4
        assert serves(running)
    assert "a connection of site west (1 so far): it has 16 connections already" in running.log.read_text()


def test_silent_connections_displace_one_another_and_not_the_handshakes_of_sites(running: GatewayProcess) -> None:
    with ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(socket.create_connection(("127.0.0.1", running.port)))
        assert serves(running)
        assert running.memory < MAX_MEMORY_MB / 2


def test_sites_are_admitted_and_removed_while_the_gateway_runs(running: GatewayProcess) -> None:
    add_sites(running.keys, ["east"])
    file = running.keys / "server" / "sites" / "east.pub"
    until = time.monotonic() + 20
    while not serves(running, "east"):
        assert time.monotonic() < until
    check_admitted(f"127.0.0.1:{running.port}", running.site("east"))
    with running.connect(running.site("east")) as connection, running.connect(running.site("south")) as other:
        file.unlink()
        with suppress(ConnectionError):
            assert connection.recv(1) == b""
        other.sendall(request(signed(running, "south")))
        assert b" 200 " in read_response(other)
    assert b"its key is not registered" in running.ask("east", request(signed(running, "east")))
    assert "request of 'CN=east'" not in running.log.read_text()


@pytest.mark.parametrize(
    ("ahead", "took", "words"),
    [(60, 0, "59 s ahead of"), (-400, 0, "400 s behind"), (60, 90, "59 s ahead of"), (-100, 0, ""), (5, 0, "")],
)
def test_a_site_whose_clock_is_wrong_is_told_by_how_much(ahead: int, took: int, words: str) -> None:
    stamp = datetime(2030, 1, 1, tzinfo=UTC)
    sent = stamp + timedelta(seconds=ahead)
    arguments = (stamp, sent, sent + timedelta(seconds=took), "fl.example.org:9092")
    if not words:
        server_checks.check_clock(*arguments)
        return
    with pytest.raises(authority_module.FedeltaError, match=f"the clock of this machine is {words} that of server"):
        server_checks.check_clock(*arguments)


def test_a_slow_response_does_not_look_like_a_wrong_clock() -> None:
    sent = datetime(2030, 1, 1, tzinfo=UTC)
    for delay in (0, 20, 40):
        stamp, received = sent + timedelta(seconds=delay), sent + timedelta(seconds=40)
        server_checks.check_clock(stamp, sent, received, "fl.example.org:9092")


def test_a_site_is_told_why_its_certificate_is_refused(
    running: GatewayProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = f"127.0.0.1:{running.port}"
    assert reachable(server, running.site("north"))
    mine = tmp_path / "north"
    shutil.copytree(running.site("north"), mine)
    key = load_public_key(running.keys / "server" / "sites" / "north.pub")
    (mine / "site.crt").write_bytes(Authority.create().sign_site(key, "north").public_bytes(PEM))
    with pytest.raises(authority_module.FedeltaError, match="has not signed it"):
        reachable(server, mine)
    authority = Authority.load(running.keys / "authority" / "ca.key", running.keys / "authority" / "ca.crt")
    monkeypatch.setattr(authority_module, "VALIDITY", timedelta(seconds=1))
    (mine / "site.crt").write_bytes(authority.sign_site(key, "north").public_bytes(PEM))
    expired = datetime.now(UTC) + timedelta(seconds=1.1)
    monkeypatch.setattr("fedelta.flower.site.tls.check_validity", lambda *_: None)
    while datetime.now(UTC) < expired:
        time.sleep(0.1)
    with pytest.raises(authority_module.FedeltaError, match="it has expired or is not valid yet; do both clocks agree"):
        reachable(server, mine)
    lines = running.log.read_text()
    assert "was not signed by the federation's authority" in lines
    assert "its certificate has expired" in lines
