"""Flower's processes on this machine: what they give is what one process gives."""

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
from fedelta.flower.site import trainer_process as warm_trainer
from fedelta.flower.site.ipc import RelayError, ask, listen, receive, send
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


class Seen(Observer):
    def __init__(self) -> None:
        self.rounds: list[int] = []

    def round_done(self, record: Any) -> None:
        self.rounds.append(record["round"])


class Killer(Seen):
    """Kills a process in round 2.

    Args:
        victim: a part of its command line.
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
def test_flowers_nodes_and_its_simulation_give_the_bytes_of_one_process(tiny_config: Any) -> None:
    alone = run(tiny_config(name="alone", rounds=4, **MIXED))
    for ray in (False, True):
        seen = Seen()
        config = tiny_config(name=f"ray-{ray}", rounds=4, **MIXED)
        apart = run_on_loopback(config, resume=False, observer=seen, ray=ray)
        assert files(apart) == files(alone)
        assert apart.result == alone.result
        assert seen.rounds == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_run_goes_on_over_flower_with_blank_nodes(tiny_config: Any) -> None:
    changes = {**MIXED, "federation": {"participation": 0.67, "precision": "int8"}}
    whole = run(tiny_config(name="whole", rounds=6, **changes))
    run(tiny_config(name="parts", rounds=2, **changes))
    run_on_loopback(tiny_config(name="parts", rounds=4, **changes), resume=True, observer=Observer())
    parts = run(tiny_config(name="parts", rounds=6, **changes), resume=True)

    def without_bytes(each: Run) -> list[Any]:
        return [{k: v for k, v in r.items() if not k.startswith("bytes") and k != "caught_up"} for r in each.records]

    # Bytes differ: a node that is blank is sent the patches that it has missed.
    assert without_bytes(parts) == without_bytes(whole)
    assert any(record["caught_up"] for record in parts.records)
    assert files(parts)[1] == files(whole)[1]


@pytest.mark.slow
def test_a_trainer_that_is_killed_comes_back_and_nothing_is_lost(tiny_config: Any) -> None:
    # With messages in int8 a client's memory of what they left out has to come back too.
    changes = {**MIXED, "federation": {"participation": 0.67, "precision": "int8"}}
    alone = run(tiny_config(name="alone", rounds=4, **changes))
    killer = Killer("warm_trainer")
    apart = run_on_loopback(tiny_config(name="apart", rounds=4, **changes), resume=False, observer=killer)
    assert killer.warnings == ["trainer ended with exit code -9 and is started again"]
    assert files(apart)[1] == files(alone)[1]
    assert [r["train_loss"] for r in apart.records] == [r["train_loss"] for r in alone.records]
    assert all(not r["skipped"] for r in apart.records)


@pytest.mark.slow
def test_a_node_that_is_killed_is_started_again(tiny_config: Any) -> None:
    killer = Killer("client-001")
    changes = {**MIXED, "federation": {"deadline": 10.0, "min_clients": 2}}
    apart = run_on_loopback(tiny_config(name="apart", rounds=24, **changes), resume=False, observer=killer)
    assert "node-client-001 ended with exit code -9 and is started again" in killer.warnings
    assert len(apart.records) == 24
    assert "client-001" in apart.records[-1]["clients"]
    assert {client for record in apart.records for client in record["skipped"]} <= {"client-001"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "line"),
    [("flwr-serverapp", "the ServerApp ended without a word"), ("flower-superlink", "the SuperLink ended")],
)
def test_a_server_that_is_killed_says_so_and_goes_on(victim: str, line: str, tiny_config: Any) -> None:
    whole = run(tiny_config(name="whole", rounds=4, **MIXED))
    config = tiny_config(name="parts", rounds=4, **MIXED)
    with pytest.raises(FedeltaError, match=line):
        run_on_loopback(config, resume=False, observer=Killer(victim))
    parts = run_on_loopback(config, resume=True, observer=Observer())
    assert len(parts.records) == 4
    assert files(parts)[1] == files(whole)[1]


@pytest.mark.slow
def test_of_those_sampled_the_first_make_the_round(tiny_config: Any) -> None:
    changes = {**MIXED, "federation": {"sample": 3, "keep": 2, "min_clients": 2}}
    apart = run_on_loopback(tiny_config(name="apart", rounds=5, **changes), resume=False, observer=Observer())
    assert all(len(record["clients"]) == 2 for record in apart.records)
    assert all(list(record["skipped"].values()) == ["2 others came first"] for record in apart.records)
    assert any(record["late"] for record in apart.records[1:])


def kill_children(text: str) -> None:
    """Kill -9 those processes below this one that have the text in their command line."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if text in " ".join(child.cmdline()):
                found.append(child)
    assert found
    for child in found:
        child.kill()


@pytest.mark.slow
def test_a_run_that_fails_in_a_round_says_why_and_leaves_no_process(
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


def test_a_run_that_can_not_begin_says_why(tiny_config: Any, tmp_path: Path) -> None:
    config = tiny_config(name="bad", **{**MIXED, "data": {"source": str(tmp_path / "absent.csv")}})
    with pytest.raises(FedeltaError, match=r"^data source .*absent.csv: no such file or folder$"):
        run_on_loopback(config, resume=False, observer=Observer())
    for changes, line in (
        ({"method": "fedsa", "ranks": {}}, "not over Flower"),
        ({"training": {"stack": 2}}, "it is 1"),
    ):
        with pytest.raises(FedeltaError, match=line):
            run_on_loopback(tiny_config(name="bad", **{**MIXED, **changes}), resume=False, observer=Observer())


def test_what_one_process_is_told_another_hears(tmp_path: Path) -> None:
    heard: list[Any] = []

    class Listener(Observer):
        def __getattribute__(self, name: str) -> Any:
            return lambda *arguments: heard.append((name, *arguments))

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
    assert heard == [
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


def test_a_reason_from_elsewhere_is_one_short_line() -> None:
    found = read_update("a", {"failed": "no\nway " + "x" * 10_000}, b"")
    assert str(found).startswith("client a: no way xxx")
    assert len(str(found)) < 1100
    assert "\n" not in str(read_update("a", {"refused": "no\nway"}, b""))
    assert "damaged" in str(read_update("a", {}, b"")) or "header" in str(read_update("a", {}, b""))


@pytest.mark.parametrize("noise", [b"", b"x" * 40, (9).to_bytes(8, "big") + b"not json!" + bytes(8), bytes(16)])
def test_noise_on_its_socket_does_not_end_a_trainer(noise: bytes, tmp_path: Path) -> None:
    class TrainerProcess:
        finished = False
        answered: ClassVar[list[Any]] = []

        def answer(self, facts: Any, blob: bytes) -> Any:  # noqa: ARG002
            self.answered.append(facts)
            return {"ok": 1}, b""

    path = tmp_path / "own" / "socket"
    server = listen(path)
    serving = threading.Thread(target=warm_trainer.serve, args=(server, TrainerProcess()), daemon=True)
    serving.start()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(noise)
    assert ask(str(path), {"kind": "query", "clients": []})[0] == {"ok": 1}
    assert TrainerProcess.answered[-1] == {"kind": "query", "clients": []}
    assert serving.is_alive()


def test_only_the_owner_reaches_a_trainer(tmp_path: Path) -> None:
    with listen(tmp_path / "own" / "socket"):
        assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "own" / "socket").stat().st_mode & 0o777 == 0o600


def test_a_message_ends_where_it_says(tmp_path: Path) -> None:
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
    mine, other = socket.socketpair()
    other.sendall((2**40).to_bytes(8, "big"))
    with pytest.raises(RelayError, match="1099511627776 bytes, expected at most"):
        receive(mine)
    other.sendall((9).to_bytes(8, "big") + b"short")
    other.close()
    with pytest.raises(RelayError, match="ended within"):
        receive(mine)


def test_an_answer_may_come_before_the_question_returns() -> None:
    mine, other = socket.socketpair()

    class AnsweredAtOnce(socket.socket):
        """Whose other end has read a message, answered it and gone before `sendall` returns."""

        def sendall(self, *data: Any) -> None:
            super().sendall(*data)
            if other.fileno() != -1:
                receive(other)
                other.sendall((8).to_bytes(8, "big") + b'{"ok":1}' + bytes(8))
                other.close()

    with AnsweredAtOnce(fileno=mine.detach()) as connection:
        send(connection, {"kind": "query"})
        assert receive(connection) == ({"ok": 1}, b"")


def test_the_client_app_starts_without_torch() -> None:
    code = "import sys, fedelta.flower.site.client_app; sys.exit('torch' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_the_command_line_runs_it(tiny_config: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_config(name="cli", rounds=1, **MIXED).dump()))
    command = [sys.executable, "-m", "fedelta.cli", "run", str(config), "--engine", "flower"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fedex" in done.stdout


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_no_process_and_goes_on(tiny_config: Any, tmp_path: Path) -> None:
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
    # Everything that was started has the scratch folder in its command line or environment.
    while time.monotonic() < until and (left := _with_environment(str(scratch))):
        time.sleep(0.2)
    assert not left
    parts = run_on_loopback(data, resume=True, observer=Observer())
    assert 2 <= len(parts.records) == 8
    assert files(parts)[1] == files(whole)[1]


def _with_environment(text: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_twenty_clients_finish_ten_rounds(tiny_config: Any) -> None:
    changes = {"method": "fedex", "partition": {"kind": "iid", "clients": 20}, "training": {"steps": 1}}
    alone = run(tiny_config(name="alone", rounds=10, **changes))
    apart = run_on_loopback(tiny_config(name="apart", rounds=10, **changes), resume=False, observer=Observer())
    assert not any(record["skipped"] for record in apart.records)
    assert files(apart) == files(alone)
