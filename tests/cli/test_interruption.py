"""Signals that end a command: it cleans up, and its exit code is that of the signal."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

PROGRAM = """
import sys, time
from pathlib import Path
from fedelta.cli.interruption import Interruption

folder = Path(sys.argv[1])
with Interruption() as interruption:
    try:
        with Interruption():
            folder.mkdir()
            print("ready", flush=True)
            time.sleep(60)
    except KeyboardInterrupt:
        print("cleanup", flush=True)
        time.sleep(0.3)
        folder.rmdir()
sys.exit(128 + interruption.number)
"""


def start(tmp_path: Path, before: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", before + PROGRAM, str(tmp_path / "scratch")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_with_its_code_and_a_second_one_does_not_stop_the_cleanup(
    number: signal.Signals, tmp_path: Path
) -> None:
    child = start(tmp_path)
    child.send_signal(number)
    assert child.stdout is not None
    assert child.stdout.readline() == "cleanup\n"
    for other in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        child.send_signal(other)
    assert child.wait(20) == 128 + number
    assert not (tmp_path / "scratch").exists()


def test_a_hangup_that_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    child = start(tmp_path, "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    child.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 143


def test_a_forked_process_ends_by_a_signal_as_it_would_without_us(tmp_path: Path) -> None:
    program = """
import os, signal, sys, time
from fedelta.cli.interruption import Interruption
with Interruption():
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.strip() == str(-signal.SIGTERM)
    assert not done.stderr


def test_folders_of_killed_processes_are_removed_by_the_next(tmp_path: Path) -> None:
    program = """
import os, sys
from fedelta.flower.scratch import scratch_folder
with scratch_folder() as folder:
    print(folder, flush=True)
    (folder / "server.key").write_text("secret")
    if sys.argv[1:]:
        os.kill(os.getpid(), 9)
    sys.stdin.read()
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    (tmp_path / "fedelta-of-another-program").mkdir()

    def run(*arguments: str) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        child = subprocess.Popen([sys.executable, "-c", program, *arguments], text=True, env=environment, **pipes)
        assert child.stdout is not None
        folders.append(Path(child.stdout.readline().strip()))
        return child

    folders: list[Path] = []
    run("killed").wait()
    assert folders[0].exists()
    alive = run()
    other = run()
    assert [folder.exists() for folder in folders] == [False, True, True]
    for child in (alive, other):
        child.communicate("")
    assert [path.name for path in tmp_path.iterdir()] == ["fedelta-of-another-program"]


def has_rounds(folder: Path) -> bool:
    """Return whether a run below this folder has finished a round."""
    try:
        return any(file.stat().st_size for part in ("runs", "grid") for file in (folder / part).rglob("rounds.jsonl"))
    except OSError:
        return False  # a file was replaced meanwhile


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", ["run", "compare", "sweep", "run --engine flower"])
def test_no_process_of_a_command_survives_a_signal(
    command: str, number: signal.Signals, tiny_config: Any, tmp_path: Path
) -> None:
    (scratch := tmp_path / "tmp").mkdir()
    settings = tiny_config(rounds=500, workers=2, method="fedex").dump()
    if command == "sweep":
        config = {key: settings[key] for key in ("model", "data", "partition", "training", "ranks", "lora")}
        axes = {"method": {"FedEx": {"method": "fedex"}, "zero padding": {"method": "zero-padding"}}}
        config |= {"rounds": 500}
        settings = {
            "name": "grid",
            "output": str(tmp_path / "grid"),
            "seeds": [0],
            "config": config,
            "axes": axes,
            "experiments": {"main": {"axes": {"method": "all"}, "rows": "method"}},
        }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    name, *options = command.split()
    child = subprocess.Popen(
        [sys.executable, "-m", "fedelta.cli", name, str(tmp_path / "config.yaml"), *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    until = time.monotonic() + 200
    while child.poll() is None and not has_rounds(tmp_path):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert child.poll() is None, child.communicate()[1]
    descendants = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(number)
    _, printed = child.communicate(timeout=30)
    assert child.returncode == 128 + number, printed
    assert printed.splitlines()[-1].startswith("stopped; finished rounds are kept")
    assert not list(scratch.glob("fedelta-*"))
    psutil.wait_procs(descendants, timeout=10)
    assert not [each for each in descendants if each.is_running()]
