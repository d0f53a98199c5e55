"""A bf16 base with a separate patch computes the same as an fp32 base with the patch written into its weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from comparisons import distance
from fedelta.learning.model.base_model import ModelSettings, load_base
from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.lowrank import LowRank

pytestmark = pytest.mark.gpu

ROUNDING = 2.0**-8
"""The largest relative error of one number in bf16."""


def lora_model(folder: Path, dtype: str, device: str) -> LoraModel:
    settings = ModelSettings(name=str(folder), dtype=dtype, device=device)
    base = load_base(settings, 0, AutoTokenizer.from_pretrained(folder), 0, "completion")
    return LoraModel(base, LoraSettings(target_modules="all-linear"))


def random_adapter(model: LoraModel, rank: int) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    return Adapter(
        {
            module: LoraPair(
                torch.randn(rank, n, generator=generator) / n**0.5, torch.randn(m, rank, generator=generator), 0.05
            )
            for module, (m, n) in model.shapes.items()
        }
    )


def passes(model: LoraModel, tokens: Tensor) -> dict[str, Tensor]:
    """Results of a forward and backward pass: the logits, and the gradient of the loss with respect to each B."""
    model.peft.eval()
    model.peft.zero_grad()
    out = model.peft(input_ids=tokens.to(model.device), labels=tokens.to(model.device))
    out.loss.backward()
    gradients = {f"gradient of {name}": pair.B.grad.clone() for name, pair in model.live().items()}
    return {"logits": out.logits.detach()} | gradients


@pytest.mark.parametrize("form", ["dense", "factors"])
def test_a_patched_bf16_base_equals_an_fp32_oracle(
    form: str, device: str, causal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "factors":
        # Treat every base as too large for a dense patch.
        monkeypatch.setattr("fedelta.learning.model.base_patch.MAX_DENSE_BYTES", 0)
    folder = causal("llama-64")
    tested, oracle = lora_model(folder, "bfloat16", device), lora_model(folder, "float32", "cpu")
    assert (tested.patch.factor_bytes > 0) == (form == "factors")
    assert oracle.patch.factor_bytes == 0
    with torch.no_grad():
        rounded = dict(tested.peft.named_parameters())
        for name, parameter in oracle.peft.named_parameters():
            parameter.copy_(rounded[name].float())
    adapter = random_adapter(tested, 4)
    patches = {module: LowRank(pair.B[:, :3] * 0.2, pair.A[:3]) for module, pair in random_adapter(tested, 6).items()}
    tokens = torch.randint(3, 20, (4, 12), generator=torch.Generator().manual_seed(2))
    for model in (tested, oracle):
        model.load(adapter, {})
    plain = {model: passes(model, tokens) for model in (tested, oracle)}
    for model in (tested, oracle):
        model.patch.set(patches)
    patched = {model: passes(model, tokens) for model in (tested, oracle)}
    assert patched[tested].keys() == plain[oracle].keys() == {"logits", *(f"gradient of {name}" for name in adapter)}
    for name, expected in patched[oracle].items():
        # The rounding errors of the layers accumulate. Without a patch they are as large.
        rounding = max(distance(plain[tested][name], plain[oracle][name]), 2 * ROUNDING)
        assert distance(patched[tested][name], expected) < 2 * rounding, name
    assert distance(plain[oracle]["logits"], patched[oracle]["logits"]) > 16 * ROUNDING


@pytest.mark.parametrize("form", ["dense", "factors"])
def test_one_patched_layer_is_exact_up_to_the_rounding_of_its_output(
    form: str, device: str, causal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is x·(W0 + C)ᵀ in float64 from the same bf16 numbers."""
    if form == "factors":
        monkeypatch.setattr("fedelta.learning.model.base_patch.MAX_DENSE_BYTES", 0)
    model = lora_model(causal("llama-64"), "bfloat16", device)
    patches = {module: pair.product() for module, pair in random_adapter(model, 3).items()}
    model.patch.set(patches)
    for module, product in patches.items():
        layer = model.layers[module].get_base_layer()
        x = torch.randn(16, layer.in_features, generator=torch.Generator().manual_seed(3)).bfloat16()
        C = product.U.double() @ product.V.double()
        W0 = layer.weight.detach().cpu().double()
        with torch.no_grad():
            output = layer(x.to(model.device))
        assert output.dtype == torch.bfloat16
        assert distance(output, x.double() @ (W0 + C).T) < ROUNDING, module
        assert distance(x.double() @ W0.T, x.double() @ (W0 + C).T) > 5 * ROUNDING, module
