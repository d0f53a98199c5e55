"""The modules that are trained whole beside LoRA, such as a new classification head."""

from typing import Any

import torch
from torch import nn

from fedelta.errors import FedeltaError


def modules_to_train(model: Any, names: tuple[str, ...] | None) -> list[str]:
    """Full names of the modules that are trained in full, in addition to LoRA.

    Args:
        names: names of modules or endings of them. None means the classification heads that `find_heads` finds, and
            no module of a language model, whose head is already trained.

    Raises:
        FedeltaError: if the model lacks a module.
    """
    if names is None:
        return [] if model.can_generate() else find_heads(model)
    all_names = [name for name, _ in model.named_modules()]
    selected = []
    for name in names:
        matches = [full for full in all_names if full == name or full.endswith(f".{name}")]
        if not matches:
            raise FedeltaError(f"lora.modules_to_save: the model has no module {name!r}")
        selected += matches
    return sorted(set(selected))


def find_heads(model: Any) -> list[str]:
    """Names of all modules that must be trained to classify: everything between the backbone and the label.

    These are the model's children outside the backbone (`classifier`, `pre_classifier`, `score`) and the pooler
    inside it, as far as a gradient of the logits reaches them. The pooler is included because BERT's, pretrained for
    another task, hurts accuracy if it stays frozen.
    """
    backbone = getattr(model, model.base_model_prefix, None)
    candidates = {name: child for name, child in model.named_children() if child is not backbone}
    pooler = getattr(backbone, "pooler", None)
    if isinstance(pooler, nn.Module):
        candidates[f"{model.base_model_prefix}.pooler"] = pooler
    candidates = {n: c for n, c in candidates.items() if any(p.requires_grad for p in c.parameters())}
    text = model.config.get_text_config()
    tokens = torch.full((1, 2), 0 if text.pad_token_id != 0 else 1, device=model.device)
    if model.config.is_encoder_decoder:
        tokens[:, -1] = text.eos_token_id  # Where the head reads.
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    if not logits.isfinite().all():
        raise FedeltaError(f"model {model.config._name_or_path}: it computes NaN or infinity")
    used = []
    for name, child in candidates.items():
        gradients = torch.autograd.grad(logits.sum(), list(child.parameters()), retain_graph=True, allow_unused=True)
        if any(gradient is not None for gradient in gradients):
            used.append(name)
    return sorted(used)
