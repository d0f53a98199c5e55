"""A GPU without enough memory ends a run in one line that names what to lower."""

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
    """From the second round on, the process gets no more of the GPU's memory than it holds."""

    def clients_started(self, round: int, clients: int) -> None:  # noqa: ARG002
        if round == 1:
            gc.collect()
            torch.cuda.empty_cache()
            # Less than is in use already: what is in use stays, and nothing is added.
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
def test_out_of_memory_ends_in_one_line_that_names_what_to_lower(
    stack: int, limit: Limit, calm: Callable[..., Config], causal: Any, tmp_path: Path
) -> None:
    """A stack that does not fit is tried one by one, which does not fit either."""
    # Some thousand tokens a pass: tensors above 1 MB, for which torch's allocator keeps no spare room.
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


def test_the_limit_is_gone_afterwards(device: str, calm: Callable[..., Config]) -> None:
    finished = run(calm("encoder", device, "unlimited"))
    assert len(finished.records) == 2
