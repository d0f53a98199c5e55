"""Prompts and completions as turns of a chat, by the tokenizer's own template."""

from collections.abc import Iterator, Sequence
from typing import Any

from fedelta.errors import FedeltaError, in_one_line
from fedelta.learning.tasks.plain import Tokens


def read(prompts: Sequence[str], completions: Sequence[str], tokenizer: Any) -> Iterator[tuple[Tokens, Tokens, Tokens]]:
    """Of each text the tokens before the user's words, the others up to the answer, and the answer's up to its end.

    Raises:
        FedeltaError: if the template fails, changes what it has said once an answer follows, or gives it no end.
    """
    end = end_of_answer(tokenizer)
    begin = _before_the_user(tokenizer)
    for prompt, completion in zip(prompts, completions, strict=True):
        asked = _apply(tokenizer, [("user", prompt)], True)
        told = _apply(tokenizer, [("user", prompt), ("assistant", completion)], False)
        if told[: len(asked)] != asked:
            raise FedeltaError("the tokenizer's chat template puts something else before an answer than before none")
        answer = told[len(asked) :]
        # After the end there may be a line break, which nobody has to learn.
        own = begin if asked[: len(begin)] == begin else []
        yield own, asked[len(own) :], answer[: len(answer) - answer[::-1].index(end)]


def _before_the_user(tokenizer: Any) -> Tokens:
    """What the template puts before any prompt: a text's beginning, a system's turn, the header of the user's."""
    one, other = (_apply(tokenizer, [("user", prompt)], True) for prompt in ("a", "b"))
    return one[: next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), 0)]


def end_of_answer(tokenizer: Any) -> int:
    """The special token that the template puts after an answer.

    Raises:
        FedeltaError: if there is none: the model would never learn to stop.
    """
    one, other = (_apply(tokenizer, [("user", "a"), ("assistant", answer)], False, False) for answer in ("b", "c"))
    # What both end with comes after the answer.
    same = next((i for i, (x, y) in enumerate(zip(one[::-1], other[::-1], strict=False)) if x != y), 0)
    after = one[len(one) - same :]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    found = [token for token in tokenizer(after, add_special_tokens=False)["input_ids"] if token in special]
    if not found:
        raise FedeltaError("the tokenizer's chat template puts no special token after an answer, so it has no end")
    return found[0]


def _apply(tokenizer: Any, turns: Sequence[tuple[str, str]], more: bool, tokens: bool = True) -> Any:
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=more, tokenize=tokens, return_dict=tokens)
    except Exception as error:
        # A template is a program of its author's.
        raise FedeltaError(f"the tokenizer's chat template fails: {in_one_line(error)}") from error
    return found["input_ids"] if tokens else found
