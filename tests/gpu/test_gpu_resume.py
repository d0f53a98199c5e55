"""A run that is killed and resumed on the same device ends with the same bits, even with dropout."""

from collections.abc import Mapping
from typing import Any

import pytest

from fedelta.federation.engines import Observer
from fedelta.runs.config import Config
from fedelta.runs.runner import Run, run

pytestmark = pytest.mark.gpu


class Killed(Exception):
    """Raised to end a run."""


class Killer(Observer):
    """End a run after a given round."""

    def __init__(self, after: int) -> None:
        self.after = after

    def round_done(self, record: Mapping[str, Any]) -> None:
        if record["round"] == self.after:
            raise Killed


def bits(finished: Run) -> dict[str, bytes]:
    """Contents of the files that are equal after equal runs."""
    folder = finished.folder.adapter_folder
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return files | {"rounds.jsonl": finished.folder.rounds_file.read_bytes()}


def check(whole: Config, parts: Config) -> None:
    uninterrupted = run(whole)
    with pytest.raises(Killed):
        run(parts, observer=Killer(after=1))
    resumed = run(parts, resume=True)
    assert len(resumed.records) == whole.rounds == 3
    assert bits(resumed) == bits(uninterrupted)


@pytest.mark.parametrize("stack", [1, 2])
def test_a_resumed_encoder_with_dropout_ends_with_the_same_bits(
    stack: int, device: str, tiny_config: Any, tiny_bert: Any
) -> None:
    """The model has dropout inside attention, after it, and before LoRA."""
    whole, parts = (
        tiny_config(
            name=name,
            rounds=3,
            method="fedex",
            model={"name": str(tiny_bert), "device": device},
            lora={"alpha": 8, "dropout": 0.1},
            training={"steps": 3, "batch_size": 8, "learning_rate": 0.01, "stack": stack},
        )
        for name in ("whole", "parts")
    )
    check(whole, parts)


def test_a_resumed_bf16_causal_model_with_checkpointing_ends_with_the_same_bits(
    device: str, causal_config: Any, causal: Any
) -> None:
    whole, parts = (
        causal_config(
            name=name,
            rounds=3,
            model={
                "name": str(causal("llama")),
                "device": device,
                "dtype": "bfloat16",
                "gradient_checkpointing": True,
            },
            lora={"alpha": 8, "dropout": 0.1, "target_modules": "all-linear"},
            training={"steps": 2, "batch_size": 8, "learning_rate": 0.02},
            partition={"clients": 2},
        )
        for name in ("whole", "parts")
    )
    check(whole, parts)
