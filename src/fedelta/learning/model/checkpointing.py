"""Gradient checkpointing, under the names of old and new versions of transformers.

transformers 5.23 renamed it to activation checkpointing. The old names raise a warning there, and v6 removes them.
"""

from typing import Any


def enable_checkpointing(model: Any) -> None:
    """Make a model recompute the activations of each layer in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def uses_checkpointing(model: Any) -> bool:
    """Tell whether a model recomputes its activations in the backward pass."""
    new_name = "is_activation_checkpointing"
    return bool(getattr(model, new_name if hasattr(model, new_name) else "is_gradient_checkpointing", False))
