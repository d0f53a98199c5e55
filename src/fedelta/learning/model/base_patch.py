"""Patches C that turn a layer's base weight W0 into W0 + C.

In an fp32 base, W0 + C is written into the weight. A base of fewer bits keeps W0 and adds x·Cᵀ to the layer's output,
because rounding W0 + C to bf16 would lose most of C. C itself is rounded relative to its own size, which loses nothing
that matters. For a large base of few bits a dense C would be larger than the base. There, patches stay fp32 factors
and x·Vᵀ·Uᵀ is added, as long as the factors are smaller than C.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedelta.lora.lowrank import Dense, LowRank, Product

MAX_DENSE_BYTES = 2**30
"""Total bytes of all dense fp32 C up to which they stay dense, because one product per layer is faster than two."""


class BasePatch:
    """The patch of all adapted layers of a model, replaced as a whole.

    Args:
        layers: module → PEFT's LoRA layer around the base layer.
        dtype: type of the base model's floating-point weights.

    Attributes:
        factor_bytes: total bytes up to which patches should stay factors (see `PatchedBase`). 0 means that they are
            always summed into a dense C.
    """

    def __init__(self, layers: Mapping[str, Any], dtype: torch.dtype) -> None:
        self._layers = layers
        self._dtype = dtype
        self._original: dict[str, Tensor] = {}
        self._patched: set[str] = set()
        self._separate: dict[str, tuple[Tensor, ...]] = {}
        self._hooked: set[str] = set()
        dense = sum(4 * layer.out_features * layer.in_features for layer in layers.values())
        written = any(layer.get_base_layer().weight.dtype == torch.float32 for layer in layers.values())
        self.factor_bytes = 0 if written or dense <= MAX_DENSE_BYTES else dense

    @torch.no_grad()
    def set(self, patches: Mapping[str, Product]) -> None:
        """Make the base W0 + C. This replaces the previous patch.

        Args:
            patches: module → C, (m, n) out×in, fp32. Modules without a patch return to W0.
        """
        self._separate = {}
        for module in [*patches, *(self._patched - patches.keys())]:
            layer = self._layers[module]
            weight = layer.get_base_layer().weight
            if weight.dtype == torch.float32:
                original = self._original.setdefault(module, weight.detach().clone())
                if module not in patches:
                    weight.copy_(original)
                    continue
                C = _dense(patches[module]).to(weight.device)
                weight.copy_(original + (C.T if layer.fan_in_fan_out else C))
            elif module in patches:
                self._separate[module] = self._factors(patches[module], weight)
                if module not in self._hooked:
                    layer.get_base_layer().register_forward_hook(self._hook(module))
                    self._hooked.add(module)
        self._patched = set(patches)

    def _factors(self, patch: Product, weight: Tensor) -> tuple[Tensor, ...]:
        """Matrices by which a layer's input is multiplied, in this order: (Vᵀ, Uᵀ) or (Cᵀ,)."""
        if isinstance(patch, LowRank) and self.factor_bytes:
            return patch.V.T.to(weight.device), patch.U.T.to(weight.device)
        # In the type in which the layer computes, which is not that of a quantized weight.
        return (_dense(patch).to(weight.device).T.to(weight.dtype if weight.is_floating_point() else self._dtype),)

    def _hook(self, module: str) -> Any:
        def add_patch(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:  # noqa: ARG001
            if module not in self._separate:
                return output
            added = inputs[0]
            for factor in self._separate[module]:
                added = added.to(factor.dtype) @ factor
            return output + added.to(output.dtype)

        return add_patch


def _dense(patch: Product) -> Tensor:
    if isinstance(patch, Dense):
        return patch.W
    C = torch.zeros(patch.shape)
    patch.add_to(C)
    return C
