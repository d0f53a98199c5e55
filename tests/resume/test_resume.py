"""A run that is killed at any moment resumes from its last finished round and writes the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from causal import TASK
from fedelta.errors import FedeltaError
from fedelta.federation import checkpoint, run_folder
from fedelta.federation.checkpoint import load_checkpoint
from fedelta.federation.round_lines import RoundLines
from fedelta.federation.run_folder import RunFolder
from fedelta.learning.model.smollm2 import smollm2_folder
from fedelta.runs.config import Config
from fedelta.runs.runner import Run, run

# Dropout, partial participation, loss-based ranks and patches: all the state that a checkpoint must save.
FULL = {
    "method": "fedex",
    "lora": {"alpha": 8, "dropout": 0.1},
    "ranks": {"allocation": "loss", "low": 2, "high": 4, "share": 0.5},
    "federation": {"participation": 0.5, "dropout": 0.1},
}


def outcome(folder: Path) -> dict[str, bytes]:
    files = [folder / "rounds.jsonl", folder / "result.json", *(folder / "adapter").rglob("*.*")]
    files += folder.glob("generations.jsonl")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def command(config: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "fedelta.cli", "run", str(config), *options]


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_kill_at_three_random_moments_and_resume_to_the_same_bytes(
    tiny_config: Any, tmp_path: Path, environment: dict[str, str]
) -> None:
    rounds = 40
    straight = run(tiny_config(name="straight", rounds=rounds, **FULL))
    data = tiny_config(name="killed", rounds=rounds, workers=2, **FULL).dump()
    config = tmp_path / "killed.yaml"
    config.write_text(yaml.safe_dump(data))
    folder = tmp_path / "runs" / "killed"
    rng = random.Random()  # other moments in every test run; the assertions hold for all of them
    finished = []
    for target in sorted(rng.sample(range(2, rounds - 4), 3)):
        kill_after(target, config, folder, environment, rng.uniform(0, 0.05))
        finished.append(_lines(folder))
    assert finished[0] < finished[-1] <= rounds
    subprocess.run(command(config, "--resume"), env=environment, check=True, capture_output=True)
    assert outcome(folder) == outcome(straight.folder.path)


def kill_after(rounds: int, config: Path, folder: Path, environment: dict[str, str], wait: float) -> None:
    """Start or resume a run, and kill its process some seconds after it has finished `rounds` rounds."""
    process = subprocess.Popen(command(config, "--resume"), env=environment, stderr=subprocess.PIPE)
    while _lines(folder) < rounds and process.poll() is None:
        time.sleep(0.002)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode() if process.stderr else ""
    assert not (folder / "adapter").exists()


def _lines(folder: Path) -> int:
    file = folder / "rounds.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def language_model(method: str, packing: bool, **changes: Any) -> dict[str, Any]:
    """Settings of a language model in bfloat16 with unequal ranks and dropout, which answers prompts at the end."""
    return {
        "method": method,
        "task": {**TASK, "generate": {"max_new_tokens": 4, "limit": 12}, "answer": "text"},
        "lora": {"alpha": 8, "target_modules": "all-linear", "dropout": 0.1},
        "federation": {"participation": 0.5},
        "training": {"steps": 2, "batch_size": 8, "learning_rate": 0.02, "packing": packing},
        **changes,
    }


@pytest.mark.parametrize(("method", "packing"), [("fedex", False), ("replication", True)])
def test_a_killed_language_model_resumes_to_the_same_bytes(
    method: str, packing: bool, causal: Any, causal_config: Any, tmp_path: Path, environment: dict[str, str]
) -> None:
    model = {"name": str(causal("llama")), "dtype": "bfloat16"}
    settings = language_model(method, packing, model=model, rounds=12)
    straight = run(causal_config(name="straight", **settings))
    assert "exact" in straight.result["test"], "it has answered prompts"
    config = tmp_path / "killed.yaml"
    config.write_text(yaml.safe_dump(causal_config(name="killed", **settings | {"workers": 2}).dump()))
    folder = tmp_path / "runs" / "killed"
    rng = random.Random()
    kill_after(rng.randint(2, 7), config, folder, environment, rng.uniform(0, 0.05))
    assert 2 <= _lines(folder) < 12
    subprocess.run(command(config, "--resume"), env=environment, check=True, capture_output=True)
    assert outcome(folder) == outcome(straight.folder.path)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("method", ["fedex", "replication"])
def test_a_language_model_that_stops_between_rounds_resumes_to_the_same_bytes(
    method: str, packing: bool, causal: Any, causal_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = language_model(method, packing, model={"name": str(causal("llama")), "dtype": "bfloat16"}, rounds=5)
    straight = run(causal_config(name="straight", **settings))
    assert _resumed_after(3, causal_config(name="stopped", **settings), monkeypatch) == outcome(straight.folder.path)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_the_built_in_chat_model_resumes_to_the_same_bytes(
    packing: bool, causal_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        smollm2_folder()
    except FedeltaError as error:
        pytest.skip(str(error))
    settings = language_model(
        "fedex",
        packing,
        model={"name": "smollm2", "dtype": "bfloat16"},
        rounds=3,
        task={
            "kind": "completion",
            "prompt": "Describe this Python function in one sentence.\n\n{signature}",
            "completion": "{summary}",
            "generate": {"max_new_tokens": 4, "limit": 2},
            "answer": "text",
        },
        data={"source": "pydoc-functions", "max_length": 96, "limit": 40, "evaluation_limit": 4},
        training={"steps": 1, "batch_size": 4, "learning_rate": 1e-3, "packing": packing},
    )
    straight = run(causal_config(name="straight", **settings))
    assert _resumed_after(2, causal_config(name="stopped", **settings), monkeypatch) == outcome(straight.folder.path)


def _resumed_after(checkpoints: int, config: Config, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Outcome of a run that stops before it writes its next checkpoint, and is resumed."""
    written = [0]
    save = run_folder.save_checkpoint

    def stop(*arguments: Any) -> None:
        if written[0] == checkpoints:
            raise KeyboardInterrupt
        written[0] += 1
        save(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    return outcome(run(config, resume=True).folder.path)


@pytest.mark.parametrize("moment", ["before the line", "between line and checkpoint", "in the checkpoint's rename"])
def test_a_crash_at_each_step_of_finishing_a_round_loses_nothing(
    moment: str, tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(tiny_config(name="straight", rounds=5, **FULL))
    config = tiny_config(name="crashed", rounds=5, **FULL)
    calls = [0]

    def crash_on_third(original: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == 3:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        return wrapper

    with monkeypatch.context() as patched:
        if moment == "before the line":
            patched.setattr(RoundLines, "append", crash_on_third(RoundLines.append))
        elif moment == "between line and checkpoint":
            patched.setattr(run_folder, "save_checkpoint", crash_on_third(run_folder.save_checkpoint))
        else:
            patched.setattr(checkpoint, "write_file", crash_on_third(checkpoint.write_file))
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert outcome(run(config, resume=True).folder.path) == outcome(straight.folder.path)


@pytest.mark.parametrize("name", ["fedsa", "hetlora", "fed-plora", "flora", "fed-sb", "fedex"])
def test_state_that_methods_keep_between_rounds_survives_a_crash(
    name: str, tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state includes B at clients, pruned ranks, the seed after a restart, error feedback and optimizer moments."""
    options = {
        "hetlora": {"gamma": 0.6, "server_optimizer": "fedadam"},
        "fedex": {"residual": "rank=1", "refresh": 3, "server_optimizer": "fedavgm"},
    }.get(name, {})
    ranks = {"allocation": "uniform", "high": 4} if name == "fed-sb" else {}
    settings = {"rounds": 6, "method": {"name": name, **options}, "federation": {"participation": 0.5}}
    settings |= {"ranks": ranks} if ranks else {}
    straight = run(tiny_config(name="straight", **settings))
    assert _resumed_after(4, tiny_config(name="crashed", **settings), monkeypatch) == outcome(straight.folder.path)


def test_a_half_written_line_is_dropped(tiny_config: Any) -> None:
    config = tiny_config(rounds=3)
    first = run(config)
    expected = outcome(first.folder.path)
    first.folder.result_file.unlink()
    with first.folder.rounds_file.open("a") as file:
        file.write('{"round": 3, "cli')
    assert outcome(run(config, resume=True).folder.path) == expected


def test_resuming_a_finished_run_changes_nothing(tiny_config: Any) -> None:
    first = run(tiny_config())
    before = {p: p.stat().st_mtime_ns for p in first.folder.path.rglob("*") if p.is_file() and p.name != "config.yaml"}
    again = run(tiny_config(), resume=True)
    assert again.result == first.result
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_more_rounds_continue_where_the_run_ended(tiny_config: Any) -> None:
    straight = run(tiny_config(name="straight", rounds=6, **FULL))
    run(tiny_config(name="extended", rounds=4, **FULL))
    extended = run(tiny_config(name="extended", rounds=6, **FULL), resume=True)
    assert outcome(extended.folder.path) == outcome(straight.folder.path)


def test_a_run_is_never_overwritten(tiny_config: Any) -> None:
    run(tiny_config(rounds=1))
    with pytest.raises(FedeltaError, match="holds a run already; continue it with --resume"):
        run(tiny_config(rounds=1))


def test_a_run_that_an_earlier_version_began_continues_with_the_defaults_of_newer_keys(
    tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(tiny_config(name="straight", rounds=3))

    def older(config: Config) -> dict[str, Any]:
        data = dump(config)
        del data["training"]["packing"], data["evaluation"]["before"], data["federation"]["max_growth"]
        return data

    dump = Config.dump
    with monkeypatch.context() as earlier:
        earlier.setattr(Config, "dump", older)
        begun = run(tiny_config(name="begun", rounds=2))
    assert "packing" not in begun.folder.config_file.read_text()
    assert outcome(run(tiny_config(name="begun", rounds=3), resume=True).folder.path) == outcome(straight.folder.path)
    with pytest.raises(FedeltaError, match=r"another configuration: federation\.max_growth was 100\.0, now 50\.0"):
        run(tiny_config(name="begun", rounds=4, federation={"max_growth": 50.0}), resume=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"method": "fedex"}, "method.name was 'replication', now 'fedex'"),
        ({"seed": 3}, "seed was 0, now 3"),
        (
            {"training": {"steps": 2, "batch_size": 8, "learning_rate": 0.02}},
            "training.learning_rate was 0.01, now 0.02",
        ),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(
    change: dict[str, Any], reason: str, tiny_config: Any
) -> None:
    first: Run = run(tiny_config(rounds=1))
    before = outcome(first.folder.path)
    with pytest.raises(FedeltaError, match=f"belongs to another configuration: {reason}"):
        run(tiny_config(rounds=1, **change), resume=True)
    assert outcome(first.folder.path) == before


def test_a_damaged_checkpoint_is_refused(tiny_config: Any) -> None:
    first = run(tiny_config(rounds=1))
    file = first.folder.checkpoint_file
    whole = file.read_bytes()
    for damaged in (whole[:-10], whole[:50], b"", b"not a checkpoint at all"):
        file.write_bytes(damaged)
        with pytest.raises(FedeltaError, match=f"checkpoint {file}: "):
            load_checkpoint(file)


def test_two_processes_never_write_one_run(tiny_config: Any) -> None:
    config = tiny_config()
    folder = RunFolder(config.folder, config.dump())
    with (
        folder.hold(),
        pytest.raises(FedeltaError, match="another process is writing to this run"),
        RunFolder(config.folder, {}).hold(patience=0.1),
    ):
        pass
    # The run wrote nothing, so no folder is left.
    assert not config.folder.parent.exists()
    run(config)
    assert not (config.folder / ".lock").exists()
