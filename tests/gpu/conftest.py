"""Tests of a CUDA device. FEDELTA_TEST_DEVICE=cpu runs them on the CPU in its place, so that they keep working."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedelta.federation.checkpoint import load_checkpoint
from fedelta.lora.files.peft_read import open_adapter
from fedelta.runs.config import Config
from fedelta.runs.runner import Run


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


def distance(mine: Tensor, other: Tensor) -> float:
    """‖mine − other‖ / ‖other‖, in float64 on the CPU."""
    mine, other = mine.detach().cpu().double(), other.detach().cpu().double()
    return float((mine - other).norm() / other.norm().clamp(min=1e-300))


def server_tensors(finished: Run) -> dict[str, Tensor]:
    """The global adapter's factors and the heads, as the checkpoint holds them."""
    state = load_checkpoint(finished.folder.checkpoint_file).state
    factors = {
        f"{module}.{name}": getattr(pair, name) for module, pair in state.method.adapter.items() for name in "AB"
    }
    return factors | dict(state.heads)


def exported_products(finished: Run) -> dict[str, Tensor]:
    """s·B·A of each module of the exported adapter: its factors may differ where their product does not."""
    adapter = open_adapter(finished.folder.adapter_folder).read()
    return {module: pair.scale * (pair.B.double() @ pair.A.double()) for module, pair in adapter.items()}


def furthest(mine: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest `distance` of tensors of one name."""
    assert mine.keys() == other.keys()
    return max(distance(tensor, other[name]) for name, tensor in mine.items())
