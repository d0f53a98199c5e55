"""Check of whether several clients of a model can train in one pass (see `stacked`)."""

from weakref import WeakKeyDictionary

import torch
from torch import nn

from fedelta.learning.model.checkpointing import uses_checkpointing
from fedelta.learning.model.dropout import Dropout
from fedelta.learning.model.lora_model import LoraModel

_REASONS: WeakKeyDictionary[LoraModel, str | None] = WeakKeyDictionary()


def reason_not_to_stack(model: LoraModel) -> str | None:
    """Reason why a model can't train several clients at once, or None if it can.

    A trial, once per model, checks that each layer with parameters of a client sees the rows of a batch once.
    """
    if model not in _REASONS:
        _REASONS[model] = _reason(model)
    return _REASONS[model]


@torch.no_grad()
def _reason(model: LoraModel, rows: int = 3, tokens: int = 5) -> str | None:
    drops = any(isinstance(module, Dropout) and module.p > 0 for module in model.peft.modules())
    if drops and uses_checkpointing(model.peft.get_base_model()):
        return "with checkpointing the backward pass would draw other dropout than the forward pass"
    own: dict[str, nn.Module] = dict(model.layers)
    for name, head in model.active_heads().items():
        for part, module in head.named_modules():
            if list(module.parameters(recurse=False)):
                own[f"{name}.{part}" if part else name] = module
                if not isinstance(module, nn.Linear):
                    return f"head {name}.{part} is a {type(module).__name__}, but only Linear can be stacked"
    seen: dict[str, list[int]] = {name: [] for name in own}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(len(inputs[0])))
        for name, module in own.items()
    ]
    training = model.peft.training
    try:
        # Token 0 is often padding, before which some models look for the end of a text.
        batch = torch.full((rows, tokens), 2, device=model.device)
        model.peft.eval()
        model.peft(input_ids=batch, attention_mask=torch.ones_like(batch))
    finally:
        model.peft.train(training)
        for hook in hooks:
            hook.remove()
    for name, batches in seen.items():
        if batches != [rows]:
            return f"module {name} saw batches of {batches} rows, expected one batch of {rows}"
    return None
