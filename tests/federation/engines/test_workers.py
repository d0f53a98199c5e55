"""Processes forked from a warm parent: the same results in any number, also when one dies."""

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


def test_results_come_in_order_whatever_takes_longest() -> None:
    def work(i: int) -> Result:
        time.sleep(0.05 if i == 0 else 0)
        return Result({"i": i, "pid": os.getpid()}, [bytes([i]), b""])

    for count in (1, 2, 3):
        found = list(Workers(count).map(work, [1.0] * 7))
        assert [result.facts["i"] for result in found] == list(range(7))
        assert [result.blobs for result in found] == [[bytes([i]), b""] for i in range(7)]
        elsewhere = {result.facts["pid"] for result in found} - {os.getpid()}
        assert len(elsewhere) == (0 if count == 1 else count)


def test_results_as_completed_come_before_what_takes_longer(tmp_path: Path) -> None:
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


def test_fresh_workers_are_born_for_each_task() -> None:
    gathered: list[int] = []

    def work(i: int) -> Result:
        gathered.append(i)
        return Result({"pid": os.getpid(), "gathered": len(gathered)})

    found = list(Workers(2, fresh=True).map(work, [1.0] * 5))
    assert [result.facts["gathered"] for result in found] == [1] * 5
    assert len({result.facts["pid"] for result in found}) == 5


def test_expensive_tasks_start_first_within_a_window() -> None:
    assert _order([1, 3, 2, 9, 9, 1], 3) == [1, 2, 0, 3, 4, 5]


def test_a_worker_that_dies_is_replaced_and_its_task_done_again(tmp_path: Path) -> None:
    def work(i: int) -> Result:
        if i == 2 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Result({"i": i})

    assert [result.facts["i"] for result in Workers(2).map(work, [1.0] * 5)] == list(range(5))


def test_a_worker_that_dies_between_tasks_is_replaced() -> None:
    results = Workers(2).map(lambda i: Result({"i": i, "pid": os.getpid()}), [1.0] * 6)
    first = next(results)
    time.sleep(0.2)  # both have answered and wait for work
    for process in multiprocessing.active_children():
        os.kill(int(process.pid or 0), signal.SIGKILL)
        process.join()
    found = [first, *results]
    assert [result.facts["i"] for result in found] == list(range(6))
    assert first.facts["pid"] not in {result.facts["pid"] for result in found[1:]}


def test_a_worker_that_dies_while_it_answers_is_replaced(tmp_path: Path) -> None:
    def work(i: int) -> Result:
        if i == 1 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            # In a moment, when the pipe is full and nobody reads it yet.
            threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        return Result({"i": i}, [bytes(10**7)])

    results = Workers(2).map(work, [1.0] * 3)
    assert next(results).facts["i"] == 0
    time.sleep(1.0)
    assert [(result.facts["i"], len(result.blobs[0])) for result in results] == [(1, 10**7), (2, 10**7)]


def test_work_that_kills_every_worker_ends_in_one_line() -> None:
    def work(i: int) -> Result:
        if i == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return Result({})

    with pytest.raises(FedeltaError, match="died twice at the same work .signal SIGKILL, perhaps out of memory"):
        list(Workers(2).map(work, [1.0] * 4))


def test_an_error_in_a_worker_is_raised_here() -> None:
    def work(i: int) -> Result:
        raise FedeltaError(f"task {i} can't be done") if i else KeyError("absent")

    with pytest.raises(FedeltaError, match="absent|task . can't be done"):
        list(Workers(2).map(work, [1.0, 2.0]))


def test_no_worker_is_left_behind_when_nobody_wants_more() -> None:
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
    """Its state, a letter; Z is one that has ended and that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def test_workers_at_work_end_when_nobody_wants_more(tmp_path: Path) -> None:
    def work(i: int) -> Result:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(600 if i else 0)
        return Result({})

    results = Workers(2).map(work, [1.0] * 4)
    next(results)
    results.close()
    assert all(_status(int(file.name)) == "Z" for file in tmp_path.iterdir())
    assert not multiprocessing.active_children()


def test_no_worker_stays_after_an_error() -> None:
    def work(i: int) -> Result:
        raise KeyError(f"no\nway {i}")

    with pytest.raises(FedeltaError, match="KeyError: 'no.*way") as caught:
        list(Workers(2).map(work, [1.0] * 4))
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("method", ["replication", "fedex", "fedsa"])
def test_the_number_of_workers_changes_no_bit(method: str, tiny_config: Any) -> None:
    ranks = {"allocation": "loss", "low": 2, "high": 4, "share": 0.5}
    if method == "fedsa":
        ranks = {"allocation": "uniform", "high": 3}
    lora = {"dropout": 0.1}
    found = []
    for workers in (1, 2, 3):
        config = tiny_config(name=f"of-{workers}", method=method, ranks=ranks, lora=lora, workers=workers)
        finished = run(config)
        found.append((files(finished), finished.result))
    assert found[0] == found[1] == found[2]


def test_a_client_whose_worker_dies_is_trained_again_to_the_bit(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Trainer.reply

    def fragile(self: Trainer, blob: bytes, shard: Any) -> bytes:
        reply = answer(self, blob, shard)
        if not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return reply

    whole = run(tiny_config(name="whole", workers=2))
    monkeypatch.setattr(Trainer, "reply", fragile)
    assert files(run(tiny_config(name="broken", workers=2))) == files(whole)


def test_failures_are_told_the_same_from_any_process(tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Trainer.reply

    def fail(self: Trainer, blob: bytes, shard: Any) -> bytes:
        if Broadcast.from_bytes(blob).client == "client-002":
            raise RuntimeError("out of memory")
        return answer(self, blob, shard)

    monkeypatch.setattr(Trainer, "reply", fail)
    federation = {"dropout": 0.2}
    one = run(tiny_config(name="one", workers=1, federation=federation))
    two = run(tiny_config(name="two", workers=2, federation=federation))
    assert files(one) == files(two)
    # Who did nothing counts for nothing.
    counted = [[json.loads(line)["counts"] for line in run.folder.timings_file.open()] for run in (one, two)]
    assert counted[0] == counted[1]


def test_what_a_client_keeps_does_not_depend_on_where_its_update_was_damaged(
    tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Trainer.reply

    def cut(self: Trainer, blob: bytes, shard: Any) -> bytes:
        damaged = Broadcast.from_bytes(blob).client == "client-001"
        return answer(self, blob, shard)[: -9 if damaged else None]

    monkeypatch.setattr(Trainer, "reply", cut)
    ranks = {"allocation": "uniform", "high": 3}
    found = [run(tiny_config(name=f"{n}", method="fedsa", ranks=ranks, workers=n)) for n in (1, 2)]
    assert found[0].records[0]["skipped"]
    assert files(found[0]) == files(found[1])


def test_a_run_may_go_on_with_other_workers(tiny_config: Any) -> None:
    run(tiny_config(name="grown", workers=1, rounds=1))
    grown = run(tiny_config(name="grown", workers=2, rounds=3), resume=True)
    assert files(grown) == files(run(tiny_config(name="straight", workers=1, rounds=3)))


def test_threads_in_forked_workers_are_refused(tiny_config: Any) -> None:
    with pytest.raises(FedeltaError, match="threads: 2 needs workers: 1"):
        tiny_config(threads=2, workers=2)
    with pytest.raises(ValueError, match="one thread each"):
        Workers(2, threads=2)


def test_auto_measures_and_leaves_no_trace(tiny_config: Any) -> None:
    torch.manual_seed(0)
    assert files(run(tiny_config(name="auto", workers="auto"))) == files(run(tiny_config(name="one")))
