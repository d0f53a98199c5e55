"""One padding token for a tokenizer, its model and generation, and the longest text that positions allow."""

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from fedelta.errors import FedeltaError
from fedelta.learning.model.model_warning import ModelWarning

_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
"""Names of tables with one row per position."""

_OTHER_SENSES = ("vision", "visual", "image", "audio")


def with_padding(tokenizer: Any, config: Any) -> Any:
    """Make a tokenizer pad on the right, with a token that the model has.

    A padding token without a row in the embedding, or a missing one, is replaced: by the one of the model's
    configuration if it is a special token, else by the token that ends a text or stands for an unknown word.

    Args:
        tokenizer: the tokenizer, changed in place and returned.
        config: configuration of its model.

    Raises:
        FedeltaError: if no token can fill a batch.
    """
    text = config.get_text_config()
    rows = getattr(text, "vocab_size", None) or len(tokenizer)
    own = tokenizer.pad_token_id
    if own is None or not 0 <= own < rows:
        configured = getattr(text, "pad_token_id", None)
        candidates = [configured if configured in tokenizer.all_special_ids else None]
        candidates += [getattr(tokenizer, f"{name}_token_id") for name in ("eos", "unk", "bos", "sep")]
        usable = [token for token in candidates if token is not None and 0 <= token < rows]
        if not usable:
            raise FedeltaError("the tokenizer has no special token with which a batch can be padded")
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(usable[0])
        if own is not None:
            warnings.warn(
                f"the tokenizer's padding token has number {own}, but the model has {rows} tokens; "
                f"{tokenizer.pad_token} fills batches",
                ModelWarning,
                stacklevel=2,
            )
    # Absolute positions count from the first token. Generation does its own padding.
    tokenizer.padding_side = "right"
    if "attention_mask" not in tokenizer.model_input_names:
        # Without a mask a text would attend to the padding that its batch needs.
        tokenizer.model_input_names = [*tokenizer.model_input_names, "attention_mask"]
    return tokenizer


def pad_alike(model: Any, tokenizer: Any) -> None:
    """Make a model know the padding token of its tokenizer, by which a decoder's classifier finds the last token.

    A model that counts positions from its own padding token keeps it: another one would shift its positions.
    """
    if any(table.padding_idx is not None for table in _position_tables(model)):
        return
    for config in (model.config, model.config.get_text_config(), getattr(model, "generation_config", None)):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id


def longest_text(model: Any, tokenizer: Any) -> int:
    """Maximum number of tokens in a text, according to the model's positions and its tokenizer."""
    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None) or 10**9, tokenizer.model_max_length]
    for table in _position_tables(model):
        # RoBERTa's first position follows its padding token; BART and OPT leave `offset` rows unused.
        unused = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
        limits.append(table.num_embeddings - unused)
    return min(limits)


def _position_tables(model: Any) -> Iterator[nn.Embedding]:
    for name, module in model.named_modules():
        parts = name.split(".")
        of_text = not any(sense in part for part in parts for sense in _OTHER_SENSES)
        if of_text and isinstance(module, nn.Embedding) and any(part in _POSITIONS for part in parts):
            yield module
