"""The layers that get LoRA: what a configuration names, without the routed experts of a mixture of experts.

The experts of a mixture are often one 3-D parameter per layer, which is not a layer. PEFT then turns names such as
`gate_proj`, and `all-linear`, into targets inside these parameters, whose adapters are not a product B·A. They stay
unadapted, and a warning says so.
"""

import re
import warnings
from typing import Any

from torch import nn

from fedelta.errors import FedeltaError, one_line
from fedelta.learning.model.model_warning import ModelWarning

ALL_LINEAR = "all-linear"

_EXPERT_NAMES = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
"""Names that PEFT takes for parameters of experts where earlier versions of transformers had such layers."""


def lora_targets(base: Any, targets: tuple[str, ...] | str | None) -> list[str] | str | None:
    """Return the targets in the form in which PEFT adapts layers only.

    Args:
        base: the model without LoRA.
        targets: `lora.target_modules`.

    Raises:
        FedeltaError: if the targets name experts.
    """
    experts = _experts(base)
    if targets is None or not experts:
        return list(targets) if isinstance(targets, tuple) else targets
    linear = [name for name, module in base.named_modules() if _is_linear(module)]
    # PEFT leaves out the output layer and the heads of a classifier too.
    backbone = [name for name in linear if base.get_submodule(name) is not base.get_output_embeddings()]
    backbone = [name for name in backbone if "." in name]
    if targets == ALL_LINEAR:
        layers = [name for name in backbone if name.rpartition(".")[2] not in _EXPERT_NAMES]
    elif isinstance(targets, str):
        layers = [name for name in linear if re.fullmatch(targets, name)]
    else:
        layers = [name for name in linear if any(f".{name}".endswith(f".{target}") for target in targets)]
    _refuse_experts(targets, layers, experts)
    total = sum(parameter.numel() for parameter in base.parameters())
    left = sum(experts.values())
    others = sorted({name.rpartition(".")[2] for name in backbone if name not in layers})
    also = f", and layers {', '.join(others)}" if targets == ALL_LINEAR and others else ""
    warnings.warn(
        f"lora.target_modules: the routed experts ({next(iter(experts))}, …), {left / total:.0%} of all weights, "
        f"get no LoRA{also}",
        ModelWarning,
        stacklevel=2,
    )
    return layers or (list(targets) if isinstance(targets, tuple) else targets)


def _experts(base: Any) -> dict[str, int]:
    """Parameter → number of elements, for parameters with a dimension for the expert."""
    return {
        f"{name}.{own}": parameter.numel()
        for name, module in base.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and "expert" in f"{name}.{own}".lower()
    }


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _refuse_experts(targets: tuple[str, ...] | str, layers: list[str], experts: dict[str, int]) -> None:
    named = [name for name in targets if name.rpartition(".")[2] in _EXPERT_NAMES] if isinstance(targets, tuple) else []
    own = {expert.rpartition(".")[2] for expert in experts}
    named += [name for name in targets if isinstance(targets, tuple) and name.rpartition(".")[2] in own]
    named += [layer for layer in layers if isinstance(targets, str) and layer.rpartition(".")[2] in _EXPERT_NAMES]
    if isinstance(targets, str) and targets != ALL_LINEAR:
        named += [expert for expert in experts if re.fullmatch(targets, expert)]
    if named:
        raise FedeltaError(
            f"lora.target_modules: {one_line(named[0])} names routed experts, one parameter per layer, "
            "for which there is no LoRA here; name other layers, such as q_proj, or set all-linear"
        )


def refuse_missing_targets(targets: tuple[str, ...] | str | None, layers: dict[str, Any]) -> None:
    """Raise if a target has no layer. PEFT ignores such a name if another one has a layer."""
    for name in targets if isinstance(targets, tuple) else ():
        if not any(f".{layer}".endswith(f".{name}") for layer in layers):
            raise FedeltaError(f"lora.target_modules: no layer's name is or ends with {name!r}")


def refuse_shared_weights(model: Any, layers: dict[str, Any]) -> None:
    """Raise if an adapted layer shares its weight with another module, as a tied output layer does.

    A base patch there would also change the embedding, and PEFT would merge the adapter into both.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.removeprefix("base_model.model."))
    for name, layer in layers.items():
        own = f"{name}.base_layer.weight"
        others = [other for other in names.get(id(layer.get_base_layer().weight), []) if other != own]
        if others:
            raise FedeltaError(f"module {name}: its weight is also {others[0]}, so LoRA would change both modules")
