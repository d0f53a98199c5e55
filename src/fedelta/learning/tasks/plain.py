"""Prompts and completions as one text each, without turns."""

from collections.abc import Iterator, Sequence
from typing import Any

from fedelta.errors import FedeltaError

Tokens = list[int]


def read(prompts: Sequence[str], completions: Sequence[str], tokenizer: Any) -> Iterator[tuple[Tokens, Tokens, Tokens]]:
    """Of each text the tokens that begin it, those of the prompt, and those of the completion with an end.

    Both are tokenized as the one text that they are; a token across the seam is the completion's.

    Raises:
        FedeltaError: if the tokenizer has no end, or a prompt is empty where nothing begins a text.
    """
    if tokenizer.eos_token_id is None:
        raise FedeltaError("the tokenizer has no end-of-text token, without which a completion has no end")
    if not tokenizer.is_fast:
        raise FedeltaError("the tokenizer is a slow one, expected a fast one (tokenizer.json)")
    begin = _beginning(tokenizer)
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    plain = {"add_special_tokens": False, "return_attention_mask": False, "return_offsets_mapping": True}
    found = tokenizer(texts, **plain)
    for prompt, tokens, offsets in zip(prompts, found["input_ids"], found["offset_mapping"], strict=True):
        known = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(tokens))
        if not begin and known == 0:
            raise FedeltaError("an empty prompt, and the tokenizer has no token that begins a text")
        yield begin, tokens[:known], [*tokens[known:], tokenizer.eos_token_id]


def _beginning(tokenizer: Any) -> Tokens:
    """The tokens that this tokenizer puts before a text."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return whole[: next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)]


def fit(begin: Tokens, before: Tokens, after: Tokens, length: int) -> tuple[Tokens, int]:
    """All of a text in so many tokens, and how many of them are known before the completion.

    A long prompt loses its beginning, down to half of the room; what is left over is cut from the end.

    Raises:
        FedeltaError: if there is no room for a token of each.
    """
    room = length - len(begin)
    if room < 2:
        raise FedeltaError(f"data.max_length {length} leaves no room beside {len(begin)} tokens before every prompt")
    kept = max(0, min(len(before), max(room - len(after), room // 2)))
    return [*begin, *before[len(before) - kept :], *after][:length], min(len(begin) + kept, length)
