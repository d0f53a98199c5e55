"""Clients that train in one pass on the GPU give the same results as each one alone."""

from collections.abc import Callable
from typing import Any

import pytest

from comparisons import max_distance, server_tensors
from fedelta.federation.client import Trainer
from fedelta.runs.config import Config
from fedelta.runs.runner import run

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-4


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_a_stack_on_the_device_trains_each_client_as_it_would_alone(
    kind: str, device: str, calm: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four clients with mixed ranks in two stacks, with clipped gradients and AdamW."""
    stacks: list[int] = []
    true = Trainer.reply_together

    def count(self: Trainer, *arguments: Any) -> Any:
        replies = true(self, *arguments)
        stacks.append(len(replies or []))
        return replies

    monkeypatch.setattr(Trainer, "reply_together", count)
    alone, together = (
        run(calm(kind, device, f"stack-{stack}", method="fedex", training={"stack": stack})) for stack in (1, 2)
    )
    assert stacks == [2] * 4
    for record, expected in zip(together.records, alone.records, strict=True):
        assert record["train_loss"] == pytest.approx(expected["train_loss"], rel=TOLERANCE)
        assert record["validation"]["loss"] == pytest.approx(expected["validation"]["loss"], rel=TOLERANCE)
    assert max_distance(server_tensors(together), server_tensors(alone)) < TOLERANCE
