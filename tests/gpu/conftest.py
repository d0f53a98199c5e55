"""Tests of a CUDA device. FEDELTA_TEST_DEVICE=cpu runs them on the CPU in its place, so that they keep working."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedelta.runs.config import Config


@pytest.fixture(scope="session")
def device() -> str:
    """The device under test, as `model.device` names it."""
    asked = os.environ.get("FEDELTA_TEST_DEVICE", "cuda")
    if asked == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device; FEDELTA_TEST_DEVICE=cpu runs these tests on the CPU")
    return asked


@pytest.fixture
def calm(tiny_config: Any, causal_config: Any, calm_bert: Path, causal: Any) -> Callable[..., Config]:
    """Makes a configuration of a model without dropout, `encoder` or `causal`, on a device.

    Mixed ranks, AdamW, and gradients that are clipped in every step.
    """

    def make(kind: str, device: str, name: str, **changes: Any) -> Config:
        encoder = kind == "encoder"
        base = str(calm_bert if encoder else causal("llama"))
        training = {"steps": 3, "batch_size": 8, "learning_rate": 0.005, "max_grad_norm": 0.1}
        data: dict[str, Any] = {"rounds": 2, "name": name, "federation": {"participation": 1}}
        data |= changes | {
            "model": {"name": base, "device": device, **changes.get("model", {})},
            "training": training | changes.get("training", {}),
        }
        return tiny_config(**data) if encoder else causal_config(**data)

    return make
