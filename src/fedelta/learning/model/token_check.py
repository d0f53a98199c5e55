"""A check of a task's tokens against the model that will read them, before training."""

from collections.abc import Mapping
from typing import Any

from fedelta.errors import FedeltaError
from fedelta.learning.data.examples import Completions, Examples


def check_tokens(model: Any, tokenizer: Any, splits: Mapping[str, Examples]) -> None:
    """Raise if a text holds a token that the model lacks, or has no place where the head of an encoder-decoder reads.

    A tokenizer may know more tokens than its model, as long as no text uses them.

    Args:
        model: the model with or without LoRA.
        tokenizer: its tokenizer.
        splits: name of each split → its texts.

    Raises:
        FedeltaError: naming the split and the text.
    """
    rows = model.get_input_embeddings().num_embeddings
    end = model.config.get_text_config().eos_token_id if model.config.is_encoder_decoder else None
    ends: int | None = None
    for name, examples in splits.items():
        for i, features in enumerate(examples.features):
            tokens = features["input_ids"]
            prompt = examples.prompts[i] if isinstance(examples, Completions) else []
            largest = max(*tokens, *prompt, 0, 0)
            if largest >= rows:
                token = tokenizer.convert_ids_to_tokens(largest)
                raise FedeltaError(
                    f"{name} text {i + 1} holds token {largest} ({token!r}), but the model has {rows} tokens "
                    f"and its tokenizer {len(tokenizer)}; expected the model's own tokenizer"
                )
            if end is not None:
                ends = tokens.count(end) if ends is None else ends
                if not tokens.count(end) or tokens.count(end) != ends:
                    raise FedeltaError(
                        f"{name} text {i + 1} has {tokens.count(end)} end tokens (number {end}); a "
                        f"{model.config.model_type} classifier expects the same number in all texts, at least one"
                    )
