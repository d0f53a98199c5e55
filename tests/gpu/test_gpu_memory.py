"""A run that exhausts the GPU's memory ends with one line that names the settings to change."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from causal import write_rows
from fedelta.federation.engines import Observer
from fedelta.learning.device import DeviceError
from fedelta.runs.config import Config
from fedelta.runs.runner import run

pytestmark = pytest.mark.gpu


class Limit(Observer):
    """Prevent the process from allocating more of the GPU's memory, from the second round on."""

    def clients_started(self, round: int, clients: int) -> None:  # noqa: ARG002
        if round == 1:
            gc.collect()
            torch.cuda.empty_cache()
            # The limit is below current use, so the memory in use stays allocated and nothing can be added.
            torch.cuda.set_per_process_memory_fraction(1e-6)


@pytest.fixture
def limit(device: str) -> Iterator[Limit]:
    if device != "cuda":
        pytest.skip("the CPU's memory is not limited here")
    try:
        yield Limit()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()


LINE = "out of memory while client-000 trains; to need less, lower training.micro_batch_size "


@pytest.mark.parametrize("stack", [1, 2])
def test_running_out_of_memory_ends_the_run_with_one_line_that_names_a_setting(
    stack: int, limit: Limit, calm: Callable[..., Config], causal: Any, tmp_path: Path
) -> None:
    """After a stack that does not fit, its clients train one by one, which does not fit either."""
    # A pass of some thousand tokens has tensors above 1 MB, for which torch's allocator has no reserve.
    rows = write_rows(tmp_path / "many.jsonl", 2000)
    config = calm(
        "causal",
        "cuda",
        f"limited-{stack}",
        model={"name": str(causal("llama-64"))},
        data={"source": str(rows), "max_length": 32},
        partition={"clients": 2},
        training={"batch_size": 1024, "steps": 1, "stack": stack, "micro_batches": False},
    )
    with pytest.raises(DeviceError) as caught:
        run(config, observer=limit)
    assert str(caught.value).startswith(LINE)
    assert "\n" not in str(caught.value)


def test_the_memory_limit_is_removed_after_the_test(device: str, calm: Callable[..., Config]) -> None:
    finished = run(calm("encoder", device, "unlimited"))
    assert len(finished.records) == 2
