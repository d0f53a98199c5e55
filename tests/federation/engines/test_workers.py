"""Forked workers give the same results in any number, even if a worker dies."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fedelta.errors import FedeltaError
from fedelta.federation.client import Trainer
from fedelta.federation.engines.workers import Result, Workers, _order
from fedelta.protocol.messages import Broadcast
from fedelta.runs.runner import Run, run


def files(finished: Run) -> list[bytes]:
    adapters = sorted(finished.folder.adapter_folder.rglob("adapter_model.safetensors"))
    assert adapters
    return [path.read_bytes() for path in [*adapters, finished.folder.rounds_file]]


def test_map_yields_results_in_order_even_if_the_first_task_is_slow() -> None:
    def work(i: int) -> Result:
        time.sleep(0.05 if i == 0 else 0)
        return Result({"i": i, "pid": os.getpid()}, [bytes([i]), b""])

    for count in (1, 2, 3):
        results = list(Workers(count).map(work, [1.0] * 7))
        assert [result.facts["i"] for result in results] == list(range(7))
        assert [result.blobs for result in results] == [[bytes([i]), b""] for i in range(7)]
        worker_pids = {result.facts["pid"] for result in results} - {os.getpid()}
        assert len(worker_pids) == (0 if count == 1 else count)


def test_as_completed_yields_fast_results_before_slow_ones(tmp_path: Path) -> None:
    def work(i: int) -> Result:
        while i == 0 and not (tmp_path / "others").exists():
            time.sleep(0.01)
        return Result({"i": i})

    order = []
    for i, result in Workers(2).as_completed(work, [1.0] * 5):
        assert result.facts["i"] == i
        order.append(i)
        if len(order) == 4:
            (tmp_path / "others").touch()
    assert sorted(order) == list(range(5))
    assert order[-1] == 0


def test_fresh_workers_are_forked_for_each_task() -> None:
    history: list[int] = []

    def work(i: int) -> Result:
        history.append(i)
        return Result({"pid": os.getpid(), "tasks": len(history)})

    results = list(Workers(2, fresh=True).map(work, [1.0] * 5))
    assert [result.facts["tasks"] for result in results] == [1] * 5
    assert len({result.facts["pid"] for result in results}) == 5


def test_expensive_tasks_start_first_within_a_window() -> None:
    assert _order([1, 3, 2, 9, 9, 1], 3) == [1, 2, 0, 3, 4, 5]


def test_a_worker_that_dies_is_replaced_and_its_task_runs_again(tmp_path: Path) -> None:
    def work(i: int) -> Result:
        if i == 2 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Result({"i": i})

    assert [result.facts["i"] for result in Workers(2).map(work, [1.0] * 5)] == list(range(5))


def test_a_worker_that_dies_between_tasks_is_replaced() -> None:
    results = Workers(2).map(lambda i: Result({"i": i, "pid": os.getpid()}), [1.0] * 6)
    first = next(results)
    time.sleep(0.2)  # both workers have sent a result and wait for a task
    for process in multiprocessing.active_children():
        os.kill(int(process.pid or 0), signal.SIGKILL)
        process.join()
    others = list(results)
    assert [result.facts["i"] for result in (first, *others)] == list(range(6))
    assert first.facts["pid"] not in {result.facts["pid"] for result in others}


def test_a_worker_that_dies_while_it_sends_its_result_is_replaced(tmp_path: Path) -> None:
    def work(i: int) -> Result:
        if i == 1 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            # The kill comes when the pipe is full and not yet read.
            threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        return Result({"i": i}, [bytes(10**7)])

    results = Workers(2).map(work, [1.0] * 3)
    assert next(results).facts["i"] == 0
    time.sleep(1.0)
    assert [(result.facts["i"], len(result.blobs[0])) for result in results] == [(1, 10**7), (2, 10**7)]


def test_a_task_that_kills_every_worker_raises_one_line() -> None:
    def work(i: int) -> Result:
        if i == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return Result({})

    with pytest.raises(FedeltaError, match="died twice on the same task .signal SIGKILL, perhaps out of memory"):
        list(Workers(2).map(work, [1.0] * 4))


def test_an_error_in_a_worker_is_raised_in_the_parent() -> None:
    def work(i: int) -> Result:
        raise FedeltaError(f"task {i} can't be done") if i else KeyError("absent")

    with pytest.raises(FedeltaError, match="absent|task . can't be done"):
        list(Workers(2).map(work, [1.0, 2.0]))


def test_no_idle_worker_is_left_after_close() -> None:
    results = Workers(2).map(lambda _: Result({"pid": os.getpid()}), [1.0] * 8)
    pid = next(results).facts["pid"]
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_workers_end_with_their_parent_even_at_work(tmp_path: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from fedelta.federation.engines.workers import Workers\n"
        "def work(i):\n"
        f"    (Path({str(tmp_path)!r}) / str(os.getpid())).touch()\n"
        "    time.sleep(600)\n"
        "list(Workers(2).map(work, [1.0] * 4))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    until = time.monotonic() + 60
    while len(pids := [int(file.name) for file in tmp_path.iterdir()]) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while any(_status(pid) != "Z" for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(pids) == 2
    assert not any(_status(pid) != "Z" for pid in pids)


def _status(pid: int) -> str:
    """The letter of the process's state in /proc; Z also if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def test_busy_workers_end_after_close(tmp_path: Path) -> None:
    def work(i: int) -> Result:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(600 if i else 0)
        return Result({})

    results = Workers(2).map(work, [1.0] * 4)
    next(results)
    results.close()
    assert all(_status(int(file.name)) == "Z" for file in tmp_path.iterdir())
    assert not multiprocessing.active_children()


def test_no_worker_is_left_after_an_error() -> None:
    def work(i: int) -> Result:
        raise KeyError(f"no\nway {i}")

    with pytest.raises(FedeltaError, match="KeyError: 'no.*way") as caught:
        list(Workers(2).map(work, [1.0] * 4))
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("method", ["replication", "fedex", "fedsa"])
def test_results_are_identical_for_any_number_of_workers(method: str, tiny_config: Any) -> None:
    ranks = {"allocation": "loss", "low": 2, "high": 4, "share": 0.5}
    if method == "fedsa":
        ranks = {"allocation": "uniform", "high": 3}
    lora = {"dropout": 0.1}
    outcomes = []
    for workers in (1, 2, 3):
        config = tiny_config(name=f"of-{workers}", method=method, ranks=ranks, lora=lora, workers=workers)
        finished = run(config)
        outcomes.append((files(finished), finished.result))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_a_client_whose_worker_dies_is_trained_again_with_identical_results(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = Trainer.reply

    def fragile(self: Trainer, blob: bytes, shard: Any) -> bytes:
        update = reply(self, blob, shard)
        if not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return update

    whole = run(tiny_config(name="whole", workers=2))
    monkeypatch.setattr(Trainer, "reply", fragile)
    assert files(run(tiny_config(name="broken", workers=2))) == files(whole)


def test_failures_are_recorded_alike_from_any_process(tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = Trainer.reply

    def fail(self: Trainer, blob: bytes, shard: Any) -> bytes:
        if Broadcast.from_bytes(blob).client == "client-002":
            raise RuntimeError("out of memory")
        return reply(self, blob, shard)

    monkeypatch.setattr(Trainer, "reply", fail)
    federation = {"dropout": 0.2}
    one = run(tiny_config(name="one", workers=1, federation=federation))
    two = run(tiny_config(name="two", workers=2, federation=federation))
    assert files(one) == files(two)
    # Clients that dropped out or failed add nothing to the counts.
    counted = [[json.loads(line)["counts"] for line in run.folder.timings_file.open()] for run in (one, two)]
    assert counted[0] == counted[1]


def test_a_damaged_update_does_not_change_what_a_client_keeps_in_any_process(
    tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = Trainer.reply

    def cut(self: Trainer, blob: bytes, shard: Any) -> bytes:
        damaged = Broadcast.from_bytes(blob).client == "client-001"
        return reply(self, blob, shard)[: -9 if damaged else None]

    monkeypatch.setattr(Trainer, "reply", cut)
    ranks = {"allocation": "uniform", "high": 3}
    one, two = (run(tiny_config(name=f"{n}", method="fedsa", ranks=ranks, workers=n)) for n in (1, 2))
    assert one.records[0]["skipped"]
    assert files(one) == files(two)


def test_a_run_can_resume_with_another_number_of_workers(tiny_config: Any) -> None:
    run(tiny_config(name="grown", workers=1, rounds=1))
    grown = run(tiny_config(name="grown", workers=2, rounds=3), resume=True)
    assert files(grown) == files(run(tiny_config(name="straight", workers=1, rounds=3)))


def test_threads_in_forked_workers_are_refused(tiny_config: Any) -> None:
    with pytest.raises(FedeltaError, match="threads: 2 needs workers: 1"):
        tiny_config(threads=2, workers=2)
    with pytest.raises(ValueError, match="one thread each"):
        Workers(2, threads=2)


def test_measuring_workers_does_not_change_results(tiny_config: Any) -> None:
    torch.manual_seed(0)
    assert files(run(tiny_config(name="auto", workers="auto"))) == files(run(tiny_config(name="one")))
