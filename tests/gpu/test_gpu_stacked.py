"""Several clients in one pass on the GPU learn what each of them learns alone."""

from collections.abc import Callable
from typing import Any

import pytest

from comparisons import furthest, server_tensors
from fedelta.federation.client import Trainer
from fedelta.runs.config import Config
from fedelta.runs.runner import run

pytestmark = pytest.mark.gpu

CLOSE = 1e-4


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_a_stack_on_the_device_trains_each_client_as_alone(
    kind: str, device: str, calm: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed ranks, gradients that are clipped, AdamW; four clients in two stacks."""
    stacks: list[int] = []
    true = Trainer.reply_together

    def count(self: Trainer, *arguments: Any) -> Any:
        found = true(self, *arguments)
        stacks.append(len(found or []))
        return found

    monkeypatch.setattr(Trainer, "reply_together", count)
    alone, together = (
        run(calm(kind, device, f"stack-{stack}", method="fedex", training={"stack": stack})) for stack in (1, 2)
    )
    assert stacks == [2] * 4
    for mine, other in zip(together.records, alone.records, strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=CLOSE)
        assert mine["validation"]["loss"] == pytest.approx(other["validation"]["loss"], rel=CLOSE)
    assert furthest(server_tensors(together), server_tensors(alone)) < CLOSE
