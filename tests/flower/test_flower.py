"""Deployments on this machine produce the same bytes as a run in one process."""

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import yaml

pytest.importorskip("flwr.serverapp")

from fedelta.errors import FedeltaError
from fedelta.federation.engines.observer import Observer
from fedelta.federation.engines.rounds import read_update
from fedelta.flower.loopback import run_on_loopback
from fedelta.flower.server.progress_file import ProgressReader, ProgressWriter
from fedelta.flower.site import trainer_process
from fedelta.flower.site.ipc import IpcError, ask, listen, receive, send
from fedelta.runs.runner import Run, run

MIXED = {
    "method": "fedex",
    "partition": {"kind": "iid", "clients": 3},
    "ranks": {"allocation": "fixed", "per_client": [2, 4, 3]},
    "federation": {"participation": 0.67},
}


def files(finished: Run) -> list[bytes]:
    folder = finished.folder
    return [folder.rounds_file.read_bytes(), (folder.adapter_folder / "adapter_model.safetensors").read_bytes()]


class RoundLog(Observer):
    """Records the numbers of the finished rounds."""

    def __init__(self) -> None:
        self.rounds: list[int] = []

    def round_done(self, record: Any) -> None:
        self.rounds.append(record["round"])


class Killer(RoundLog):
    """Kills a process in round 2.

    Args:
        victim: a part of the command line of the process.
    """

    def __init__(self, victim: str) -> None:
        super().__init__()
        self.victim = victim
        self.warnings: list[str] = []

    def clients_started(self, round: int, clients: int) -> None:  # noqa: ARG002
        if round == 2:
            kill_children(self.victim)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.mark.slow
def test_nodes_and_simulated_nodes_produce_the_bytes_of_one_process(tiny_config: Any) -> None:
    alone = run(tiny_config(name="alone", rounds=4, **MIXED))
    for ray in (False, True):
        round_log = RoundLog()
        config = tiny_config(name=f"ray-{ray}", rounds=4, **MIXED)
        apart = run_on_loopback(config, resume=False, observer=round_log, ray=ray)
        assert files(apart) == files(alone)
        assert apart.result == alone.result
        assert round_log.rounds == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_run_resumes_over_flower_with_nodes_that_lack_all_patches(tiny_config: Any) -> None:
    changes = {**MIXED, "federation": {"participation": 0.67, "precision": "int8"}}
    whole = run(tiny_config(name="whole", rounds=6, **changes))
    run(tiny_config(name="parts", rounds=2, **changes))
    run_on_loopback(tiny_config(name="parts", rounds=4, **changes), resume=True, observer=Observer())
    parts = run(tiny_config(name="parts", rounds=6, **changes), resume=True)

    def without_bytes(each: Run) -> list[Any]:
        return [{k: v for k, v in r.items() if not k.startswith("bytes") and k != "caught_up"} for r in each.records]

    # The byte counts differ: a new node is sent the patches that it lacks.
    assert without_bytes(parts) == without_bytes(whole)
    assert any(record["caught_up"] for record in parts.records)
    assert files(parts)[1] == files(whole)[1]


@pytest.mark.slow
def test_a_killed_trainer_is_restarted_and_no_work_is_lost(tiny_config: Any) -> None:
    # With int8 messages, the client's error feedback has to be restored too.
    changes = {**MIXED, "federation": {"participation": 0.67, "precision": "int8"}}
    alone = run(tiny_config(name="alone", rounds=4, **changes))
    killer = Killer("trainer_process")
    apart = run_on_loopback(tiny_config(name="apart", rounds=4, **changes), resume=False, observer=killer)
    assert killer.warnings == ["trainer ended with exit code -9 and is restarted"]
    assert files(apart)[1] == files(alone)[1]
    assert [r["train_loss"] for r in apart.records] == [r["train_loss"] for r in alone.records]
    assert all(not r["skipped"] for r in apart.records)


@pytest.mark.slow
def test_a_killed_node_is_restarted(tiny_config: Any) -> None:
    killer = Killer("client-001")
    changes = {**MIXED, "federation": {"deadline": 10.0, "min_clients": 2}}
    apart = run_on_loopback(tiny_config(name="apart", rounds=24, **changes), resume=False, observer=killer)
    assert "node-client-001 ended with exit code -9 and is restarted" in killer.warnings
    assert len(apart.records) == 24
    assert "client-001" in apart.records[-1]["clients"]
    assert {client for record in apart.records for client in record["skipped"]} <= {"client-001"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "line"),
    [("flwr-serverapp", "the ServerApp ended without a result"), ("flower-superlink", "the SuperLink ended")],
)
def test_a_killed_server_is_reported_and_the_run_can_resume(victim: str, line: str, tiny_config: Any) -> None:
    whole = run(tiny_config(name="whole", rounds=4, **MIXED))
    config = tiny_config(name="parts", rounds=4, **MIXED)
    with pytest.raises(FedeltaError, match=line):
        run_on_loopback(config, resume=False, observer=Killer(victim))
    parts = run_on_loopback(config, resume=True, observer=Observer())
    assert len(parts.records) == 4
    assert files(parts)[1] == files(whole)[1]


@pytest.mark.slow
def test_a_round_keeps_the_first_replies_of_the_sampled_clients(tiny_config: Any) -> None:
    changes = {**MIXED, "federation": {"sample": 3, "keep": 2, "min_clients": 2}}
    apart = run_on_loopback(tiny_config(name="apart", rounds=5, **changes), resume=False, observer=Observer())
    assert all(len(record["clients"]) == 2 for record in apart.records)
    assert all(list(record["skipped"].values()) == ["2 others came first"] for record in apart.records)
    assert any(record["late"] for record in apart.records[1:])


def kill_children(text: str) -> None:
    """Send SIGKILL to all descendants of this process whose command line contains the text."""
    matches = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if text in " ".join(child.cmdline()):
                matches.append(child)
    assert matches
    for child in matches:
        child.kill()


@pytest.mark.slow
def test_a_run_that_fails_in_a_round_reports_why_and_leaves_no_process(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", None)
    config = tiny_config(name="bad", **{**MIXED, "training": {"steps": 2, "learning_rate": 1e30}})
    with pytest.raises(FedeltaError, match="round 0: 0 usable updates, expected at least 1"):
        run_on_loopback(config, resume=False, observer=Observer())
    until = time.monotonic() + 30
    while (left := set(_with_environment(str(scratch))) - {_command_line()}) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left


def _command_line() -> str:
    return Path("/proc/self/cmdline").read_bytes().replace(b"\0", b" ").decode()


def test_a_run_that_cannot_start_reports_why(tiny_config: Any, tmp_path: Path) -> None:
    config = tiny_config(name="bad", **{**MIXED, "data": {"source": str(tmp_path / "absent.csv")}})
    with pytest.raises(FedeltaError, match=r"^data source .*absent.csv: no such file or folder$"):
        run_on_loopback(config, resume=False, observer=Observer())
    for changes, line in (
        ({"method": "fedsa", "ranks": {}}, "not over Flower"),
        ({"training": {"stack": 2}}, "expected 1 over Flower"),
    ):
        with pytest.raises(FedeltaError, match=line):
            run_on_loopback(tiny_config(name="bad", **{**MIXED, **changes}), resume=False, observer=Observer())


def test_progress_written_by_one_process_reaches_the_observer_of_another(tmp_path: Path) -> None:
    calls: list[Any] = []

    class Listener(Observer):
        def __getattribute__(self, name: str) -> Any:
            return lambda *arguments: calls.append((name, *arguments))

    writer, reader = ProgressWriter(tmp_path / "events"), ProgressReader(tmp_path / "events", Listener())
    reader.catch_up()
    writer.run_started("fedex", 0, 3)
    writer.clients_started(0, 2)
    reader.catch_up()
    with (tmp_path / "events").open("a") as stream:
        stream.write('["warn", "half')
    reader.catch_up()
    with (tmp_path / "events").open("a") as stream:
        stream.write(' a line"]\n')
    writer.client_done("a")
    writer.evaluation_started("test", 9)
    writer.evaluation_advanced(9)
    writer.round_done({"round": 0, "ü": None})
    assert not reader.finished
    writer.finished()
    reader.catch_up()
    assert calls == [
        ("run_started", "fedex", 0, 3),
        ("clients_started", 0, 2),
        ("warn", "half a line"),
        ("client_done", "a"),
        ("evaluation_started", "test", 9),
        ("evaluation_advanced", 9),
        ("round_done", {"round": 0, "ü": None}),
    ]
    assert reader.finished
    assert reader.failure is None
    writer.failed("no disk")
    reader.catch_up()
    assert reader.failure == "no disk"


def test_a_reason_from_a_client_becomes_one_short_line() -> None:
    error = read_update("a", {"failed": "no\nway " + "x" * 10_000}, b"")
    assert str(error).startswith("client a: no way xxx")
    assert len(str(error)) < 1100
    assert "\n" not in str(read_update("a", {"refused": "no\nway"}, b""))
    assert "damaged" in str(read_update("a", {}, b"")) or "header" in str(read_update("a", {}, b""))


@pytest.mark.parametrize("noise", [b"", b"x" * 40, (9).to_bytes(8, "big") + b"not json!" + bytes(8), bytes(16)])
def test_noise_on_the_socket_does_not_end_a_trainer(noise: bytes, tmp_path: Path) -> None:
    class FakeTrainer:
        finished = False
        received: ClassVar[list[Any]] = []

        def handle(self, facts: Any, blob: bytes) -> Any:  # noqa: ARG002
            self.received.append(facts)
            return {"ok": 1}, b""

    path = tmp_path / "own" / "socket"
    server = listen(path)
    serving = threading.Thread(target=trainer_process.serve, args=(server, FakeTrainer()), daemon=True)
    serving.start()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(noise)
    assert ask(str(path), {"kind": "query", "clients": []})[0] == {"ok": 1}
    assert FakeTrainer.received[-1] == {"kind": "query", "clients": []}
    assert serving.is_alive()


def test_only_the_owner_can_open_the_socket_of_a_trainer(tmp_path: Path) -> None:
    with listen(tmp_path / "own" / "socket"):
        assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "own" / "socket").stat().st_mode & 0o777 == 0o600


def test_a_message_has_the_length_that_it_states(tmp_path: Path) -> None:
    server = listen(tmp_path / "own" / "socket")

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            facts, blob = receive(connection)
            send(connection, {**facts, "size": len(blob)}, blob[::-1])

    thread = threading.Thread(target=serve)
    thread.start()
    blob = bytes(range(256)) * 40_000
    assert ask(str(tmp_path / "own" / "socket"), {"kind": "train"}, blob) == (
        {"kind": "train", "size": len(blob)},
        blob[::-1],
    )
    thread.join()
    ours, other = socket.socketpair()
    other.sendall((2**40).to_bytes(8, "big"))
    with pytest.raises(IpcError, match="1099511627776 bytes, expected at most"):
        receive(ours)
    other.sendall((9).to_bytes(8, "big") + b"short")
    other.close()
    with pytest.raises(IpcError, match="ended within"):
        receive(ours)


def test_a_reply_may_arrive_before_send_returns() -> None:
    ours, other = socket.socketpair()

    class RepliedAtOnce(socket.socket):
        """A socket whose other end reads a message, replies and closes the connection before `sendall` returns."""

        def sendall(self, *data: Any) -> None:
            super().sendall(*data)
            if other.fileno() != -1:
                receive(other)
                other.sendall((8).to_bytes(8, "big") + b'{"ok":1}' + bytes(8))
                other.close()

    with RepliedAtOnce(fileno=ours.detach()) as connection:
        send(connection, {"kind": "query"})
        assert receive(connection) == ({"ok": 1}, b"")


def test_the_client_app_starts_without_torch() -> None:
    code = "import sys, fedelta.flower.site.client_app; sys.exit('torch' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_the_command_line_runs_the_flower_engine(tiny_config: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_config(name="cli", rounds=1, **MIXED).dump()))
    command = [sys.executable, "-m", "fedelta.cli", "run", str(config), "--engine", "flower"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fedex" in done.stdout


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_can_resume(tiny_config: Any, tmp_path: Path) -> None:
    whole = run(tiny_config(name="whole", rounds=8, **MIXED))
    config = tmp_path / "config.yaml"
    data = tiny_config(name="parts", rounds=8, **MIXED)
    config.write_text(yaml.safe_dump(data.dump()))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "fedelta.cli", "run", str(config), "--engine", "flower"]
    child = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(scratch)}, stderr=subprocess.DEVNULL)
    rounds = data.folder / "rounds.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until and not (rounds.exists() and rounds.read_bytes().count(b"\n") >= 2):
        time.sleep(0.05)
    child.kill()
    child.wait()
    # All processes of the run have the scratch folder in their environment.
    while time.monotonic() < until and (left := _with_environment(str(scratch))):
        time.sleep(0.2)
    assert not left
    parts = run_on_loopback(data, resume=True, observer=Observer())
    assert 2 <= len(parts.records) == 8
    assert files(parts)[1] == files(whole)[1]


def _with_environment(text: str) -> list[str]:
    command_lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (process / "environ").read_bytes():
                command_lines.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return command_lines


@pytest.mark.slow
def test_twenty_clients_finish_ten_rounds(tiny_config: Any) -> None:
    changes = {"method": "fedex", "partition": {"kind": "iid", "clients": 20}, "training": {"steps": 1}}
    alone = run(tiny_config(name="alone", rounds=10, **changes))
    apart = run_on_loopback(tiny_config(name="apart", rounds=10, **changes), resume=False, observer=Observer())
    assert not any(record["skipped"] for record in apart.records)
    assert files(apart) == files(alone)
