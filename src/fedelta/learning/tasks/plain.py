"""Tokens of a prompt and its completion as one plain text, without chat turns."""

from collections.abc import Iterator, Sequence
from typing import Any

from fedelta.errors import FedeltaError

Tokens = list[int]


class CutWarning(UserWarning):
    """Texts do not fit into the configured length."""


def read(prompts: Sequence[str], completions: Sequence[str], tokenizer: Any) -> Iterator[tuple[Tokens, Tokens, Tokens]]:
    """Yield for each text the tokens that begin it, the prompt's tokens, and the completion's tokens with an end token.

    Prompt and completion are tokenized as one text. A token that spans both belongs to the completion if the prompt's
    part of it is white space, as in "Answer: " and "blue". Otherwise each is tokenized by itself, because generation
    begins after the whole prompt.

    Raises:
        FedeltaError: if the tokenizer has no end-of-text token or is a slow one, or if a prompt is empty and the
            tokenizer puts no token before a text.
    """
    if tokenizer.eos_token_id is None:
        raise FedeltaError("the tokenizer has no end-of-text token, without which a completion has no end")
    if not tokenizer.is_fast:
        raise FedeltaError("the tokenizer is a slow one, expected a fast one (tokenizer.json)")
    begin = _beginning(tokenizer)
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    plain = {"add_special_tokens": False, "return_attention_mask": False, "return_offsets_mapping": True}
    encoded = tokenizer(texts, **plain)
    rows = zip(prompts, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    for prompt, text, tokens, offsets in rows:
        known = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(tokens))
        if known < len(tokens) and prompt[offsets[known][0] :].strip():
            separate = tokenizer([prompt, text[len(prompt) :]], add_special_tokens=False)["input_ids"]
            known, tokens = len(separate[0]), [*separate[0], *separate[1]]
        if not begin and known == 0:
            raise FedeltaError("an empty prompt, and the tokenizer has no token that begins a text")
        yield begin, tokens[:known], [*tokens[known:], tokenizer.eos_token_id]


def _beginning(tokenizer: Any) -> Tokens:
    """Tokens that this tokenizer puts before a text."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return whole[: next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)]


def fit(begin: Tokens, before: Tokens, after: Tokens, length: int) -> tuple[Tokens, int]:
    """Truncate a text to `length` tokens.

    A long prompt (`before`) loses its beginning, but keeps at least half of the space after `begin`. If the text is
    still too long, the completion (`after`) loses its end.

    Returns:
        The tokens, and the number of them that precede the completion.

    Raises:
        FedeltaError: if there is no space for one token of the prompt and one of the completion.
    """
    space = length - len(begin)
    if space < 2:
        raise FedeltaError(f"data.max_length {length} leaves no space after the {len(begin)} tokens before each prompt")
    prompt_length = max(0, min(len(before), max(space - len(after), space // 2)))
    return [*begin, *before[len(before) - prompt_length :], *after][:length], min(len(begin) + prompt_length, length)
