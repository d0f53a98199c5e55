"""Adapter folders of small models: saved by PEFT, changed as other tools leave them, and read back by PEFT."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

LAYERS = ["query", "intermediate.dense"]
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def classifier(folder: Path) -> Any:
    """A small classifier with a head that is the same each time."""
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)


def adapted(base: Any, seed: int, **options: Any) -> Any:
    """A PEFT model with random factors and heads."""
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "init_lora_weights": False, **options})
    wrapped = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return wrapped


def save(folder: Path, model: Path, seed: int = 0, **options: Any) -> Path:
    """Save an adapter of a classifier, using PEFT."""
    adapted(classifier(model), seed, **{"task_type": "SEQ_CLS", "target_modules": LAYERS, **options}).save_pretrained(
        folder
    )
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change fields of an adapter's configuration; `...` removes a field."""
    file = folder / CONFIG
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


def rename(folder: Path, change: Callable[[str], str]) -> Path:
    """Rename the tensors of an adapter."""
    return rewrite(folder, lambda tensors: {change(key): tensor for key, tensor in tensors.items()})


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Change the tensors of an adapter."""
    tensors = change(safetensors.torch.load_file(folder / FILE))
    tensors = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


def merged(base: Any, folder: Path) -> dict[str, Tensor]:
    """The weights of a base with an adapter merged in by PEFT, in float64."""
    model: nn.Module = peft.PeftModel.from_pretrained(base, str(folder)).double().merge_and_unload()
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def distance_from_sum(
    base: Callable[[], Any], folders: Sequence[Path], factors: Sequence[float], output: Path
) -> float:
    """‖W − W*‖ / ‖W* − W0‖, with W* = W0 + Σ w_i (W_i − W0): W, W_i and W0 are weights with and without adapters."""
    before = {name: tensor.double() for name, tensor in base().state_dict().items()}
    expected = dict(before)
    for folder, factor in zip(folders, factors, strict=True):
        for name, tensor in merged(base(), folder).items():
            expected[name] = expected[name] + factor * (tensor - before[name])
    result = merged(base(), output)
    off = sum(float((result[name] - tensor).norm() ** 2) for name, tensor in expected.items())
    size = sum(float((tensor - before[name]).norm() ** 2) for name, tensor in expected.items())
    return (off / size) ** 0.5


class Experts(nn.Module):
    """Two stacks of expert weights, (experts, in, out), as several mixtures of experts have them."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.gate_up_proj = nn.Parameter(torch.randn(3, 6, 10))
        self.down_proj = nn.Parameter(torch.randn(3, 5, 6))


class Parts(nn.Module):
    """One layer of each kind that LoRA adapts."""

    def __init__(self, transposed: bool = True) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.tokens = nn.Embedding(11, 6)
        self.image = nn.Conv2d(3, 5, (2, 3))
        self.point = nn.Conv2d(5, 4, 1)
        self.sound = nn.Conv1d(3, 4, 2)
        self.proj = nn.Linear(6, 8)
        self.router = nn.Linear(6, 3)
        self.mlp = nn.ModuleDict({"experts": Experts(transposed)})


def save_parts(folder: Path, seed: int, transposed: bool = True, **options: Any) -> Path:
    """Save an adapter of `Parts`, using PEFT."""
    adapted(Parts(transposed), seed, **options).save_pretrained(folder)
    return folder
