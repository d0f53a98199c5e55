"""Bases quantized to four and eight bits. These tests need bitsandbytes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedelta.runs.config import Config
from fedelta.runs.runner import run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantized_base_trains_and_its_adapter_loads_in_peft(
    bits: str, device: str, calm: Callable[..., Config], causal: Any
) -> None:
    pytest.importorskip("bitsandbytes")
    if device != "cuda":
        pytest.skip("tests/learning/test_causal.py tests quantized bases on a CPU")
    folder = str(causal("llama-64"))
    model = {"name": folder, "dtype": "bfloat16", "quantization": bits}
    finished = run(calm("causal", device, bits, method="fedex", model=model))
    losses = [record["train_loss"] for record in finished.records]
    assert all(math.isfinite(loss) for loss in [*losses, finished.result["test"]["loss"]])
    plain = AutoModelForCausalLM.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), finished.folder.adapter_folder)
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        changed = adapted(input_ids=tokens).logits
        assert bool(torch.isfinite(changed).all())
        assert not torch.allclose(changed, plain(input_ids=tokens).logits, atol=1e-3)
