"""A server and sites with their own rows: the same numbers as in one process, TLS and keys, and failures."""

import base64
import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

pytest.importorskip("flwr.serverapp")

import httpx
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedelta.flower.certificates import make_certificates
from fedelta.flower.site.tls import site_context
from fedelta.runs.runner import open_run, run
from site_processes import MIXED, NAMES, Federation


@pytest.mark.slow
def test_sites_with_keys_produce_the_bytes_of_one_process(tiny_config: Any, tmp_path: Path) -> None:
    alone = run(tiny_config(name="alone", rounds=4, **MIXED))
    config = tiny_config(name="apart", rounds=4, **MIXED)
    with Federation(config, tmp_path / "sites") as federation:
        federation.serve()
        federation.join_all((2, 4, 3))
        assert federation.wait("server") == 0, federation.output("server")
        for name in NAMES:
            assert federation.wait(name, 60) == 0, federation.output(name)
            assert "trained in" in federation.output(name)
    apart = open_run(config.folder)
    assert apart.folder.rounds_file.read_bytes() == alone.folder.rounds_file.read_bytes()
    adapters = [each.folder.adapter_folder / "adapter_model.safetensors" for each in (apart, alone)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.slow
def test_bad_updates_are_skipped_and_recorded(tiny_config: Any, tmp_path: Path) -> None:
    ways = ["", "nan", "shape", "version", "other client", "header", "noise", "replay", "late"]
    config = tiny_config(
        name="bad",
        rounds=3,
        method="fedex",
        partition={"kind": "iid", "clients": len(ways)},
        federation={"deadline": 8.0},
    )
    with Federation(config, tmp_path / "sites", secure=False) as federation:
        federation.serve()
        for name, how in zip(federation.names, ways, strict=True):
            federation.join_badly(name, 2, how)
        assert federation.wait("server", 400) == 0, federation.output("server")
    records = open_run(config.folder).records
    assert len(records) == 3
    name = dict(zip(ways, federation.names, strict=True))
    for record in records:
        assert name[""] in record["clients"]
        reasons = record["skipped"]
        for how, reason in {
            "nan": "holds NaN or infinite values",
            "shape": "(23, 2), expected torch.float32 (24, 2)",
            "version": "it trained on base version",
            "other client": "its update says client client-000",
            "header": "its header alone claims 10737418240",
            "noise": "damaged message",
            "late": "no reply within 8 s",
        }.items():
            assert reason in reasons[name[how]]
    assert name["replay"] in records[0]["clients"]
    assert all("its update says round 0" in record["skipped"][name["replay"]] for record in records[1:])
    assert any(name["late"] in record["late"] for record in records[1:])
    assert "skipped" in federation.output("server")


def join_untrusted(federation: Federation, tmp_path: Path) -> None:
    """Start sites that must be refused: with an unknown key, with another authority, and in plain text."""
    make_certificates(tmp_path / "other", ["unknown", "misled", "plain"], [])
    own = tmp_path / "other" / "sites"
    for name in ("unknown", "misled", "plain"):
        (federation.folder / name).mkdir()
        shutil.copy(federation.folder / NAMES[0] / "rows.csv", federation.folder / name)
    # This site trusts the server, but the server does not know its key.
    shutil.copy(federation.folder / "keys" / "server" / "ca.crt", own / "unknown" / "ca.crt")
    federation.join("unknown", 2, keys=str(own / "unknown"))
    federation.join("misled", 2, keys=str(own / "misled"))
    federation.secure = False
    federation.join("plain", 2)
    federation.secure = True


def signed(key: Path, moment: datetime.datetime, spoiled: bool = False) -> dict[str, str]:
    """Return the headers of a node's request, signed as if it were sent at `moment`."""
    private = load_ssh_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    text = moment.isoformat()
    signature = private.sign(text.encode(), ec.ECDSA(hashes.SHA256()))
    if spoiled:
        signature = signature[:-1] + bytes([signature[-1] ^ 1])
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public_key_to_bytes(private.public_key())).decode(),
        FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(signature).decode(),
        TIMESTAMP_HEADER: text,
        "content-type": "application/protobuf",
    }


def request_statuses(federation: Federation) -> dict[str, int]:
    """Return the HTTP status of requests that are sent directly to the gateway."""
    keys = federation.folder / "keys"
    context = site_context(keys / "sites" / NAMES[0])
    key = keys / "sites" / NAMES[0] / "site.key"
    public = public_key_to_bytes(load_ssh_private_key(key.read_bytes(), None).public_key())  # type: ignore[arg-type]
    body = ActivateNodeRequest(public_key=public, heartbeat_interval=30).SerializeToString()
    now = datetime.datetime.now(datetime.UTC)
    with httpx.Client(base_url=f"https://127.0.0.1:{federation.port}", verify=context, trust_env=False) as client:

        def ask(path: str, headers: dict[str, str], content: bytes = body) -> int:
            return client.post(path, content=content, headers=headers).status_code

        activate = "/v1/fleet/activate-node"
        return {
            "good": ask(activate, signed(key, now)),
            "old": ask(activate, signed(key, now - datetime.timedelta(minutes=10))),
            "altered": ask(activate, signed(key, now, spoiled=True)),
            "unsigned": ask(activate, {"content-type": "application/protobuf"}),
            "huge": ask(activate, signed(key, now), bytes(17 * 2**20)),
            "control": ask("/v1/control/list-runs", signed(key, now), b""),
            "climbing": ask("/v1/fleet/../control/list-runs", signed(key, now), b""),
            "climbing, encoded": ask("/v1/fleet/%2e%2e/control/list-runs", signed(key, now), b""),
            "runtime": ask("/v1/runtime/acquire-task", signed(key, now), b""),
        }


class Interceptor:
    """Sits between a client and a server, records the client's packets, and may change a byte of one.

    Args:
        port: port of the server.
        spoil: index of the client's packet that is changed; None for none.
    """

    def __init__(self, port: int, spoil: int | None = None) -> None:
        self.packets: list[bytes] = []
        self._server = socket.create_connection(("127.0.0.1", port))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._spoil = spoil
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._forward, daemon=True).start()

    def _forward(self) -> None:
        client, _ = self._listening.accept()
        threading.Thread(target=self._forward_back, args=(client,), daemon=True).start()
        with suppress(OSError):
            while piece := client.recv(2**16):
                if len(self.packets) == self._spoil:
                    piece = piece[:-1] + bytes([piece[-1] ^ 1])
                self.packets.append(piece)
                self._server.sendall(piece)

    def _forward_back(self, client: socket.socket) -> None:
        with suppress(OSError):
            while piece := self._server.recv(2**16):
                client.sendall(piece)
        client.close()


def check_connection_is_tamperproof(federation: Federation) -> None:
    """Check that a program between a site and its server can neither replay nor change a request."""
    keys = federation.folder / "keys"
    context = site_context(keys / "sites" / NAMES[0])
    headers = signed(keys / "sites" / NAMES[0] / "site.key", datetime.datetime.now(datetime.UTC))

    def ask(port: int) -> int:
        url = f"https://127.0.0.1:{port}/v1/fleet/pull-messages"
        return httpx.post(url, content=b"", headers=headers, verify=context, trust_env=False).status_code

    interceptor = Interceptor(federation.port)
    assert ask(interceptor.port) == 401
    # Replay the handshake and the request. The server has drawn another session key since.
    with socket.create_connection(("127.0.0.1", federation.port), 20) as replay:
        received = b""
        for piece in interceptor.packets:
            with suppress(OSError):
                replay.sendall(piece)
        with suppress(ConnectionResetError):
            while piece := replay.recv(2**16):
                received += piece
    # The server closes the connection after its part of the handshake, with an alert and no response.
    assert len(received) < 4096
    for packet in range(len(interceptor.packets)):
        with pytest.raises(httpx.TransportError):
            ask(Interceptor(federation.port, spoil=packet).port)


@pytest.mark.slow
def test_nodes_without_a_registered_key_are_refused_and_the_rounds_continue(tiny_config: Any, tmp_path: Path) -> None:
    config = tiny_config(name="apart", rounds=20, **MIXED)
    with Federation(config, tmp_path / "sites") as federation:
        federation.serve()
        # These sites wait for the server, as its own sites do.
        join_untrusted(federation, tmp_path)
        federation.join_all((2, 4, 3))
        federation.wait_for_rounds(1)
        statuses = request_statuses(federation)
        check_connection_is_tamperproof(federation)
        for name, reason in {
            "unknown": "has not signed it",
            "misled": "could not be verified with",
            "plain": "does not speak plain HTTP",
        }.items():
            assert federation.wait(name, 120) == 2
            lines = federation.output(name).splitlines()
            assert lines[-1].startswith("error: ")
            assert reason in lines[-1]
        assert federation.wait("server") == 0, federation.output("server")
        assert "refused a connection from 127.0.0.1" in federation.output("server")
    # A key that is in use is not admitted twice. Requests to other services than the nodes' are not forwarded.
    assert statuses.pop("good") == 412
    assert statuses.pop("huge") == 413
    assert {statuses.pop(way) for way in ("old", "altered", "unsigned")} == {401}
    assert set(statuses.values()) == {404}
    records = open_run(config.folder).records
    assert len(records) == 20
    assert not any(record["skipped"] for record in records)


@pytest.mark.slow
def test_a_site_joins_and_another_is_removed_between_rounds(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scratch := tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    changes = {**MIXED, "federation": {"deadline": 300.0}}
    config = tiny_config(name="apart", rounds=1000, **changes)
    with Federation(config, tmp_path / "sites") as federation:
        admitted = federation.folder / "keys" / "server" / "sites"
        late = admitted / f"{NAMES[2]}.pub"
        key = late.read_bytes()
        late.unlink()
        federation.serve()
        for name, rank in ((NAMES[0], 2), (NAMES[1], 4)):
            federation.join(name, rank)
        federation.wait_for_rounds(2)
        late.write_bytes(key)
        federation.join(NAMES[2], 3)
        until = time.monotonic() + 300
        while f"{NAMES[2]} joins with" not in federation.output("server"):
            assert time.monotonic() < until, federation.output("server")
            time.sleep(0.1)
        federation.wait_for_rounds(done(config) + 2)
        (admitted / f"{NAMES[0]}.pub").unlink()
        removed = done(config)
        assert federation.wait(NAMES[0], 120) == 2
        assert "does not know the key" in federation.output(NAMES[0])
        federation.wait_for_rounds(removed + 6)
        # A server that is killed now resumes with clients that are not those of the first round.
        federation.processes["server"].kill()
        federation.processes["server"].wait()
        federation.serve("--resume")
        federation.wait_for_rounds(done(config) + 2)
        assert list(scratch.glob("fedelta-*"))
        for name, number, line in (
            ("server", signal.SIGTERM, "--resume continues from them"),
            (NAMES[1], signal.SIGHUP, "the same command takes part again"),
            (NAMES[2], signal.SIGTERM, "the same command takes part again"),
        ):
            federation.processes[name].send_signal(number)
            assert federation.wait(name, 30) == 128 + number
            assert line in federation.output(name).splitlines()[-1]
        assert not list(scratch.glob("fedelta-*"))
    records = [json.loads(line) for line in (config.folder / "rounds.jsonl").read_text().splitlines()]
    clients = [set(record["clients"]) for record in records]
    assert clients[0] == {NAMES[0], NAMES[1]}
    assert set(NAMES) in clients
    assert clients[-1] == {NAMES[1], NAMES[2]}
    first = next(record for record in records if NAMES[2] in record["clients"])
    # The first message to the new site holds all base patches so far.
    assert first["bytes_by_client"][NAMES[2]][0] > first["bytes_by_client"][NAMES[1]][0]
    assert {reason for record in records for reason in record["skipped"].values()} <= {"its site was removed"}


def done(config: Any) -> int:
    """Return the number of finished rounds."""
    return int((config.folder / "rounds.jsonl").read_bytes().count(b"\n"))


@pytest.mark.slow
def test_a_killed_server_resumes_with_sites_that_stayed_up_and_one_that_was_restarted(
    tiny_config: Any, tmp_path: Path
) -> None:
    whole = run(tiny_config(name="whole", rounds=8, **MIXED))
    config = tiny_config(name="apart", rounds=8, **MIXED)
    with Federation(config, tmp_path / "sites") as federation:
        federation.serve()
        federation.join_all((2, 4, 3))
        federation.wait_for_rounds(2)
        federation.processes["server"].kill()
        federation.processes["server"].wait()
        done = config.folder.joinpath("rounds.jsonl").read_bytes().count(b"\n")
        assert done < 8
        # Restart this site as well: its base then lacks all patches.
        federation.processes[NAMES[2]].kill()
        federation.processes[NAMES[2]].wait()
        federation.serve("--resume")
        federation.join(NAMES[2], 3)
        assert federation.wait("server") == 0, federation.output("server")
        for name in NAMES:
            assert federation.wait(name, 60) == 0, federation.output(name)
            assert "clock" not in federation.output(name)
        assert "refused" not in federation.output("server")
        assert "clock" not in federation.output("server")
    apart = open_run(config.folder)
    assert len(apart.records) == 8
    assert [r["train_loss"] for r in apart.records] == [r["train_loss"] for r in whole.records]
    adapters = [each.folder.adapter_folder / "adapter_model.safetensors" for each in (apart, whole)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.slow
def test_a_killed_site_is_skipped_and_takes_part_again_after_a_restart(tiny_config: Any, tmp_path: Path) -> None:
    changes = {**MIXED, "federation": {"deadline": 15.0, "min_clients": 2}}
    config = tiny_config(name="apart", rounds=50, **changes)
    with Federation(config, tmp_path / "sites") as federation:
        federation.serve()
        federation.join_all((2, 4, 3))
        federation.wait_for_rounds(2)
        federation.processes[NAMES[1]].kill()
        federation.wait_for_rounds(4)
        federation.join(NAMES[1], 4)
        assert federation.wait("server") == 0, federation.output("server")
    records = open_run(config.folder).records
    assert len(records) == 50
    missed = [record["round"] for record in records if NAMES[1] in record["skipped"]]
    assert missed
    reasons = {record["skipped"][NAMES[1]].split(":")[0] for record in records if NAMES[1] in record["skipped"]}
    assert reasons <= {"TimeoutError", "its site is away", "its node failed", "its node is gone"}
    assert NAMES[1] in records[-1]["clients"]
    assert all({NAMES[0], NAMES[2]} <= set(record["clients"]) for record in records)


@pytest.mark.slow
def test_a_round_with_too_few_updates_is_repeated_and_no_work_is_lost(tiny_config: Any, tmp_path: Path) -> None:
    changes = {**MIXED, "federation": {"min_clients": 3, "deadline": 200.0}}
    whole = run(tiny_config(name="whole", rounds=5, **changes))
    config = tiny_config(name="apart", rounds=5, **changes)
    with Federation(config, tmp_path / "sites") as federation:
        federation.serve()
        federation.join_all((2, 4, 3))
        federation.wait_for_rounds(2)
        # As after a power failure: the node does not sign off, and the server holds its place for a while.
        site = psutil.Process(federation.processes[NAMES[1]].pid)
        for process in [site, *site.children(recursive=True)]:
            with suppress(psutil.Error):
                process.kill()
        federation.processes[NAMES[1]].wait()
        federation.join(NAMES[1], 4)
        assert federation.wait("server", 400) == 0, federation.output("server")
    apart = open_run(config.folder)
    assert [len(record["clients"]) for record in apart.records] == [3] * 5
    assert any(record["failed_attempts"] or record["caught_up"] for record in apart.records)
    assert [record["train_loss"] for record in apart.records] == [record["train_loss"] for record in whole.records]
    adapters = [each.folder.adapter_folder / "adapter_model.safetensors" for each in (apart, whole)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.slow
def test_a_site_with_other_settings_or_labels_is_told_why(tiny_config: Any, tmp_path: Path) -> None:
    changes = {**MIXED, "partition": {"kind": "iid", "clients": 2}, "ranks": {}}
    config = tiny_config(name="apart", rounds=1, **changes)
    with Federation(config, tmp_path / "sites", secure=False) as federation:
        federation.serve("--patience", "45")
        federation.join(NAMES[0], 2, "training.steps=9")
        rows = federation.folder / NAMES[1] / "rows.csv"
        rows.write_text(rows.read_text().replace("sea", "lake"))
        federation.join(NAMES[1], 2)
        assert federation.wait("server") == 2
        output = federation.output("server")
        assert "client-000, client-001 (0 of 2 are there, expected 2)" in " ".join(output.split())
        # The server learns what kind of problem it is. The values and the label stay at the sites.
        assert "its training.steps is not the server's" in output
        assert "training.steps is 9 here and 2 at the server" in federation.output(NAMES[0])
        assert "its rows can't be used" in output
        assert "label 'lake' is not one of the server's" in federation.output(NAMES[1])
        assert "lake" not in output
        assert not (config.folder / "rounds.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["join", "--data", "absent.csv", "--insecure", "--name", "a"], "absent.csv: no such file"),
        (["join", "--insecure", "--name", "a"], "--data FILE"),
        (["join", "--data", "rows.csv"], "--keys FOLDER, or --insecure for a trial on loopback"),
        (["join", "--data", "rows.csv", "--keys", "nowhere"], "no site.key there"),
        (["join", "--data", "r.csv", "--insecure", "--name", "a", "--server", "example.org:1"], "is for loopback"),
        (["join", "--data", "r.csv", "--insecure", "--name", "a", "--server", "example.org"], "HOST:PORT"),
        (["serve", "--keys", "nowhere"], "no server.crt there"),
        (["join", "--data", "rows.csv", "--keys", "worn"], "is not a private key without a password"),
        (["serve", "--keys", "torn"], "are not a certificate and its key"),
        (["serve", "--keys", "twins"], "are the same key"),
        (["serve", "--keys", "odd"], "is not a public key in the format of ssh-keygen"),
        (["serve", "--insecure", "--sites", "a,../b"], "site '../b': expected letters"),
        (["serve"], "--keys FOLDER, or --insecure for a trial on loopback"),
        (["serve", "--insecure"], "no site"),
        (["serve", "--insecure", "--sites", "a", "--host", "0.0.0.0"], "is for loopback"),
        (["serve", "--insecure", "--sites", "a", "method=fedsa"], "not over Flower yet"),
    ],
)
def test_mistakes_of_a_deployment_are_one_line(
    arguments: list[str], line: str, tiny_config: Any, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config().dump()))
    make_certificates(tmp_path / "keys", ["a", "b"], [])
    server = tmp_path / "keys" / "server"
    for broken in ("torn", "twins", "odd"):
        shutil.copytree(server, tmp_path / broken)
    (tmp_path / "torn" / "server.key").write_text("no key")
    shutil.copy(server / "sites" / "a.pub", tmp_path / "twins" / "sites" / "b.pub")
    (tmp_path / "odd" / "sites" / "a.pub").write_text("ssh-rsa nonsense")
    shutil.copytree(tmp_path / "keys" / "sites" / "a", tmp_path / "worn")
    (tmp_path / "worn" / "site.key").write_text("no key")
    command, *rest = arguments
    done = subprocess.run(
        [sys.executable, "-m", "fedelta.cli", command, "config.yaml", *rest],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "300"},
    )
    assert done.returncode == 2
    assert line in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
