"""A long run does not accumulate memory, open files or processes."""

import gc
import multiprocessing
import resource
from pathlib import Path
from typing import Any

import pytest

from fedelta.federation.engines.observer import Observer
from fedelta.runs.runner import run


class Watch(Observer):
    """Record resident memory (MB) and the number of open files after each round."""

    def __init__(self) -> None:
        self.megabytes: list[float] = []
        self.files: list[int] = []

    def round_done(self, record: dict[str, Any]) -> None:  # noqa: ARG002
        if len(self.files) in (9, 49):
            gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.megabytes.append(pages * resource.getpagesize() / 1e6)
        self.files.append(len(list(Path("/proc/self/fd").iterdir())))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_fifty_rounds_use_no_more_than_ten(workers: int, tiny_config: Any) -> None:
    watch = Watch()
    training = {"steps": 1, "batch_size": 4}
    run(tiny_config(rounds=50, workers=workers, training=training, evaluation={"every": 10}), observer=watch)
    assert len(watch.megabytes) == 50
    assert watch.megabytes[-1] - watch.megabytes[9] < 8
    assert watch.files[-1] <= watch.files[9]
    assert not multiprocessing.active_children()
