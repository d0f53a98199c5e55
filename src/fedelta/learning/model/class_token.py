"""Computation of an encoder's last layer for the class token only, if the head reads no other token.

Keys and values are needed for all tokens. Queries, the output projection of attention and the feed-forward layers are
needed once per text. The result is the same up to rounding.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def _bert(layer: Any, hidden: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    own, first = layer.attention.self, hidden[:, :1]
    heads = own.num_attention_heads
    context = _attend(own.query(first), own.key(hidden), own.value(hidden), heads, attention_mask, own.dropout)
    attended = layer.attention.output(context, first)
    return layer.output(layer.intermediate(attended), attended)


def _distilbert(layer: Any, hidden: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    own, first = layer.attention, hidden[:, :1]
    q, k, v = own.q_lin(first), own.k_lin(hidden), own.v_lin(hidden)
    context = own.out_lin(_attend(q, k, v, own.n_heads, attention_mask, own.dropout))
    attended = layer.sa_layer_norm(context + first)
    return layer.output_layer_norm(layer.ffn.ff_chunk(attended) + attended)


LAST_LAYER: Mapping[str, tuple[str, Callable[..., Tensor]]] = {
    **dict.fromkeys(("bert", "camembert", "electra", "roberta", "xlm-roberta"), ("encoder.layer", _bert)),
    "distilbert": ("transformer.layer", _distilbert),
}
"""Model type → path of its layers, and the last layer's forward pass for the first token only."""


def _attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, attention_mask: Tensor | None, drop: nn.Module
) -> Tensor:
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value))
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    if attention_mask is not None:
        mask = attention_mask[:, :, :1]
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    return (drop(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)


def read_class_token_alone(model: Any) -> bool:
    """Make the last layer of a classifier compute only what its head reads.

    Args:
        model: an `AutoModelForSequenceClassification`, changed in place.

    Returns:
        True if the model is of a supported type. Others stay unchanged.
    """
    if model.config.model_type not in LAST_LAYER or getattr(model.config, "is_decoder", False):
        return False
    if model.config._attn_implementation not in ("eager", "sdpa"):
        return False  # Other implementations have masks of a different form.
    path, forward = LAST_LAYER[model.config.model_type]
    layer = getattr(model, model.base_model_prefix).get_submodule(path)[-1]
    layer.forward = partial(forward, layer)
    return True
