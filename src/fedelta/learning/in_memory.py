"""Models that the calling program has loaded already.

A configuration is plain data that a run writes down, so it cannot hold a model. It is kept here, under a name made of a
digest of its weights, and a configuration refers to that name. A run can therefore only be resumed with the same
weights.
"""

import copy
import hashlib
import json
from typing import Any

from fedelta.errors import FedeltaError
from fedelta.learning.data.in_memory import PREFIX

_models: dict[str, tuple[Any, Any]] = {}


def remember_model(model: Any, tokenizer: Any, digest: str) -> str:
    """Keep a loaded model and its tokenizer for the runs of this process.

    Args:
        model: a transformers model that classifies, or a causal language model. Runs train copies of it.
        tokenizer: its tokenizer.
        digest: digest of the model's weights.

    Returns:
        The name under which `model.name` refers to it.
    """
    sha = hashlib.sha256(digest.encode())
    for part in (tokenizer.get_vocab(), tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None)):
        sha.update(json.dumps(part, sort_keys=True, default=str).encode())
    if getattr(tokenizer, "is_fast", False):
        sha.update(tokenizer.backend_tokenizer.to_str().encode())
    name = f"{PREFIX}{sha.hexdigest()[:16]}"
    _models[name] = model, tokenizer
    return name


def remembered_model(name: str) -> Any:
    """A copy of the model that `remember_model` kept.

    Raises:
        FedeltaError: if this process was not given it.
    """
    return copy.deepcopy(_entry(name)[0])


def remembered_config(name: str) -> Any:
    """The configuration of that model."""
    return _entry(name)[0].config


def remembered_tokenizer(name: str) -> Any:
    """A copy of the tokenizer that `remember_model` kept."""
    return copy.deepcopy(_entry(name)[1])


def _entry(name: str) -> tuple[Any, Any]:
    if name not in _models:
        raise FedeltaError(f"model {name} was in the memory of another process; pass the same model again")
    return _models[name]
