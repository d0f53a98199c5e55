"""Fast dropout on a CPU.

Its random numbers take a third of the time of torch's, which take a tenth of the training time of a small model.
"""

import torch
from torch import Tensor, nn

PROBABILITY_LEVELS = 2**16


class Dropout(nn.Dropout):
    """Dropout like `nn.Dropout`, with one 64-bit draw for every four elements.

    The probability is rounded to a multiple of 2⁻¹⁶. The remaining elements are scaled by the rounded probability, so
    that the expectation is exact. Draws come from torch's global generator.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * draw_mask(x.shape, self.p, x.dtype) if self.training and self.p > 0 else x


def draw_mask(shape: torch.Size, p: float, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Draw a mask: 0 for dropped elements, 1/(1 − p) for the others."""
    dropped = round(p * PROBABILITY_LEVELS)
    if dropped == PROBABILITY_LEVELS:
        return torch.zeros(shape, dtype=dtype)
    draws = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    retained = draws.view(torch.int16)[: shape.numel()].view(shape) >= dropped - PROBABILITY_LEVELS // 2
    return retained.to(dtype).mul_(PROBABILITY_LEVELS / (PROBABILITY_LEVELS - dropped))


def use_fast_dropout(model: nn.Module) -> None:
    """Replace every `nn.Dropout` of a model on the CPU. Other devices draw random numbers fast enough."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout and not child.inplace:
                setattr(module, name, Dropout(child.p).train(child.training))
