"""Tests for a CUDA device. FEDELTA_TEST_DEVICE=cpu runs them on a CPU instead, which tests the tests themselves."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedelta.runs.config import Config


@pytest.fixture(scope="session")
def device() -> str:
    """Device to test, as a value of `model.device`."""
    name = os.environ.get("FEDELTA_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device; FEDELTA_TEST_DEVICE=cpu runs these tests on the CPU")
    return name


@pytest.fixture
def calm(tiny_config: Any, causal_config: Any, calm_bert: Path, causal: Any) -> Callable[..., Config]:
    """Factory of configurations for a model without dropout, `encoder` or `causal`, on a device.

    They have mixed ranks and AdamW, and clip gradients in every step.
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
