"""Nothing of a site's rows, labels, paths or environment leaves it, in a run with errors of every kind."""

import getpass
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr.serverapp")

from fedelta.runs.runner import open_run
from site_processes import Federation

CANARIES = ("quokkarow", "quokkalabel", "quokkapath", "quokkaenvironment")
REASONS = {
    "raise": "its program failed; its own log says why",
    "input": "it can't train with its rows, its model or this broadcast",
    "memory": "its device ran out of memory",
    "shape": "expected torch.float32 (24, 2)",
    "escapes": "was not requested",
    "huge": "has the norm",
    "far": "the norm of its adapter grew to",
    "examples": "it reports 1000000000000 training examples, expected 1 to",
    "loss": "its train_loss is 1.0e+20",
    "die": "",
}
"""Way in which the third site misbehaves → what the server says. Each round has one."""


class Recorder:
    """A port that forwards to another one, and records what its clients send."""

    def __init__(self, port: int) -> None:
        self.sent = bytearray()
        self._server_port = port
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._server_port))
                except OSError:
                    client.close()
                    continue
                threading.Thread(target=self._copy, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._copy, args=(server, client, False), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, recorded: bool) -> None:
        with suppress(OSError):
            while piece := source.recv(2**16):
                if recorded:
                    with self._lock:
                        self.sent += piece
                target.sendall(piece)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
def test_nothing_of_a_sites_rows_labels_paths_or_environment_leaves_it(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUOKKA_SECRET", "quokkaenvironment")
    config = tiny_config(
        name="canary",
        rounds=len(REASONS),
        method="fedex",
        partition={"kind": "iid", "clients": 3},
        evaluation={"every": len(REASONS)},
        federation={"deadline": 20.0, "min_clients": 2},
    )
    with Federation(config, tmp_path / "quokkapath", secure=False) as federation:
        recorder = Recorder(federation.port)
        for name in federation.names:
            rows = federation.folder / name / "rows.csv"
            rows.write_text(rows.read_text().replace("the ", "the quokkarow ").replace(" a ", " a quokkarow "))
            assert "quokkarow" in rows.read_text()
        federation.serve()
        federation.port = recorder.port
        first, second, bad = federation.names
        # This site has a label that the server does not know.
        whole = (federation.folder / first / "rows.csv").read_text()
        (federation.folder / "stray").mkdir()
        (federation.folder / "stray" / "rows.csv").write_text(whole.replace("sea", "quokkalabel"))
        federation.join("stray", 2)
        federation.join(first, 2)
        federation.join(second, 2)
        federation.join_badly(bad, 2, ",".join(REASONS))
        assert federation.wait("server", 500) == 0, federation.output("server")
        for name in (first, second):
            assert federation.wait(name, 60) == 0
            last_line = federation.output(name).splitlines()[-1]
            assert (
                last_line.partition(" ")[2]
                == f"the run has ended after {len(REASONS)} rounds; its adapter is in site/adapter"
            )
            adapter = federation.folder / name / "site" / "adapter" / "adapter_model.safetensors"
            assert adapter.read_bytes() == (config.folder / "adapter" / "adapter_model.safetensors").read_bytes()
        outputs = {name: federation.output(name) for name in ("server", "stray", bad)}
    sent = bytes(recorder.sent)
    assert len(sent) > 100_000
    assert b"content-encoding" not in sent.lower(), "what is compressed can't be searched"
    words = {*CANARIES, str(tmp_path), str(Path.home()), getpass.getuser(), socket.gethostname()}
    # A short word occurs in a signature by chance.
    for word in (word for word in words if len(word) > 4):
        assert word.encode() not in sent, sent[max(0, sent.index(word.encode()) - 300) :][:600]
    for file in config.folder.glob("*.json*"):
        assert not any(canary in file.read_text() for canary in CANARIES[:2])
    # The reasons are at the sites.
    assert outputs[bad].count("row 3 of rows.csv holds quokkarow") == 2
    assert "quokkalabel" in outputs["stray"]
    # The server names each bad update, and the round continues without it.
    for record, reason in zip(open_run(config.folder).records, REASONS.values(), strict=True):
        assert record["clients"] == [first, second]
        assert set(record["shares"]) == set(record["norms"]) == {first, second}
        assert reason in record["skipped"][bad]
        assert len(record["skipped"][bad]) <= 220
    assert "\x1b" not in outputs["server"]
    assert max(map(len, outputs["server"].splitlines())) < 300
