"""Compare the published reference code of FedEx-LoRA with fedelta: error of the weight after one round.

    python experiments/exact_aggregation/published_reference.py

The published code averages A and B, takes the mean of the dense products, and subtracts the product of the means. It
adds the transpose of that residual to the weight of every layer. This is correct
for GPT-2's Conv1D, which stores its weight as in×out. It is wrong for `nn.Linear`: a square layer gives no error
message, and on any other layer torch raises.

`published` is written from this description, without copying code. The models have random weights, because the error is
one of algebra.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config

from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.contribution import Contribution
from fedelta.methods import make_method
from fedelta.runs.report.text_table import TextTable

CLIENTS, RANK, ALPHA = 3, 4, 8
SCALE = ALPHA / RANK
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "BERT": (
        BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96),
        "Linear",
        ("query", "value", "intermediate.dense"),
    ),
    "GPT-2": (
        GPT2Config(vocab_size=50, n_embd=64, n_layer=1, n_head=4, n_positions=16, **SPECIAL),
        "Conv1D",
        ("c_attn", "attn.c_proj"),
    ),
}
Step = Callable[[LoraModel, list[Adapter]], dict[str, str]]


def lora_model(config: Any, modules: tuple[str, ...]) -> LoraModel:
    """Build a model with random weights and LoRA on these modules."""
    torch.manual_seed(0)
    return LoraModel(AutoModelForSequenceClassification.from_config(config), LoraSettings(target_modules=modules))


def trained(model: LoraModel, seed: int) -> list[Adapter]:
    """Draw the A and B of each client after training: random changes to a common starting point."""
    draw = torch.Generator().manual_seed(seed)
    begin = {name: torch.randn(RANK, n, generator=draw) / n**0.5 for name, (_, n) in model.shapes.items()}
    clients = []
    for _ in range(CLIENTS):
        pairs = {}
        for name, (m, n) in model.shapes.items():
            A = begin[name] + 0.3 * torch.randn(RANK, n, generator=draw) / n**0.5
            pairs[name] = LoraPair(A, 0.1 * torch.randn(m, RANK, generator=draw), SCALE)
        clients.append(Adapter(pairs))
    return clients


def published(model: LoraModel, clients: list[Adapter]) -> dict[str, str]:
    """Load the means of A and B, and add the transposed residual to the weight. Return module → error message."""
    failed = {}
    means = {}
    for name, layer in model.layers.items():
        A = torch.stack([client[name].A for client in clients]).mean(0)
        B = torch.stack([client[name].B for client in clients]).mean(0)
        products = torch.stack([client[name].B @ client[name].A for client in clients]).mean(0)
        means[name] = LoraPair(A, B, SCALE)
        residual = SCALE * (products - B @ A)
        weight = layer.get_base_layer().weight
        if weight.shape == residual.T.shape:
            weight.data += residual.T
        else:
            failed[name] = f"torch refuses {tuple(residual.T.shape)} on {tuple(weight.shape)}"
    model.load(Adapter(means), model.head_tensors())
    return failed


def ours(model: LoraModel, clients: list[Adapter]) -> dict[str, str]:
    """Run one step of the method `fedex`, and fold its patch into the base as every client does."""
    method = make_method("fedex")
    state = method.start(model.shapes, RANK, 0)
    after, patch = method.step(state, [Contribution(f"client-{i}", 1.0, adapter) for i, adapter in enumerate(clients)])
    model.patch.set(patch)
    model.load(after.adapter.with_scale(SCALE), model.head_tensors())
    return {}


@torch.no_grad()
def effective_weight(model: LoraModel, name: str) -> Tensor:
    """Return the matrix (out, in) that a layer multiplies its input by, computed from its forward pass."""
    layer = model.layers[name]
    eye = torch.eye(layer.in_features)
    return (layer(eye) - layer(torch.zeros(1, layer.in_features))).T.double()


def errors(step: Step, architecture: str, seed: int = 0) -> dict[str, float | str]:
    """Return module → ‖W − W*‖_F / ‖W* − W0‖_F after one round, or the error message of the step.

    W* = W0 + mean of s·B·A is computed in float64.
    """
    config, _, modules = MODELS[architecture]
    model = lora_model(config, modules)
    clients = trained(model, seed)
    model.load(clients[0].map(lambda pair: LoraPair(pair.A, torch.zeros_like(pair.B), SCALE)), model.head_tensors())
    model.peft.eval()
    before = {name: effective_weight(model, name) for name in model.layers}
    failed = step(model, clients)
    result: dict[str, float | str] = {}
    for name, base in before.items():
        mean = sum(SCALE * client[name].B.double() @ client[name].A.double() for client in clients) / CLIENTS
        error = float((effective_weight(model, name) - base - mean).norm() / mean.norm())
        result[name] = failed.get(name, error)
    return result


def table() -> TextTable:
    """Make the table of errors, with one row per module."""
    lines = []
    for architecture, (_, kind, _) in MODELS.items():
        published_errors, our_errors = errors(published, architecture), errors(ours, architecture)
        for name in published_errors:
            shape = "×".join(map(str, lora_model(*MODELS[architecture][::2]).shapes[name]))
            shown = [
                value if isinstance(value, str) else f"{value:.1e}"
                for value in (published_errors[name], our_errors[name])
            ]
            lines.append([architecture, name.rpartition("layer.0.")[2] or name, f"{kind} {shape}", *shown])
    head = ["model", "module", "layer, out×in", "published", "fedelta"]
    note = (
        f"Relative error ‖W − W*‖/‖W* − W0‖ of the weight that a layer applies after one round of {CLIENTS} "
        f"clients, rank {RANK}, α {ALPHA}, in fp32 against float64."
    )
    return TextTable("published-reference", "Effective weight after one exact aggregation", head, lines, note)


def main() -> None:
    result = table()
    print(result.markdown())
    print(result.note)


if __name__ == "__main__":
    main()
