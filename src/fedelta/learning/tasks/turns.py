"""Tokens of a prompt and its completion as turns of a chat, by the tokenizer's own template."""

from collections.abc import Iterator, Sequence
from typing import Any

from fedelta.errors import FedeltaError, in_one_line
from fedelta.learning.tasks.plain import Tokens


def read(prompts: Sequence[str], completions: Sequence[str], tokenizer: Any) -> Iterator[tuple[Tokens, Tokens, Tokens]]:
    """Yield for each text the tokens before the prompt, those from the prompt to the answer, and those of the answer.

    The answer includes its end token.

    Raises:
        FedeltaError: if the template fails, puts no end after an answer, or changes the prompt once an answer follows.
    """
    end = end_of_answer(tokenizer)
    begin = _before_prompts(tokenizer)
    for prompt, completion in zip(prompts, completions, strict=True):
        question = _apply(tokenizer, [("user", prompt)], True)
        whole = _apply(tokenizer, [("user", prompt), ("assistant", completion)], False)
        if whole[: len(question)] != question:
            raise FedeltaError("the tokenizer's chat template changes the prompt's turn when an answer follows it")
        answer = whole[len(question) :]
        own = begin if question[: len(begin)] == begin else []
        # A line break may follow the end token; the model need not learn it.
        yield own, question[len(own) :], answer[: len(answer) - answer[::-1].index(end)]


def _before_prompts(tokenizer: Any) -> Tokens:
    """Tokens that the template puts before any prompt: start of text, system turn, header of the user's turn."""
    one, other = (_apply(tokenizer, [("user", prompt)], True) for prompt in ("a", "b"))
    return one[: next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), 0)]


def end_of_answer(tokenizer: Any) -> int:
    """Find the special token that the template puts after an answer.

    Raises:
        FedeltaError: if there is none, because the model would never learn to stop.
    """
    one, other = (_apply(tokenizer, [("user", "a"), ("assistant", answer)], False, False) for answer in ("b", "c"))
    # The common end of both chats is what follows the answer.
    same = next((i for i, (x, y) in enumerate(zip(one[::-1], other[::-1], strict=False)) if x != y), 0)
    after = one[len(one) - same :]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ends = [token for token in tokenizer(after, add_special_tokens=False)["input_ids"] if token in special]
    if not ends:
        raise FedeltaError("the tokenizer's chat template puts no special token after an answer, so it has no end")
    return ends[0]


def _apply(tokenizer: Any, turns: Sequence[tuple[str, str]], more: bool, tokens: bool = True) -> Any:
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=more, tokenize=tokens, return_dict=tokens)
    except Exception as error:
        # A template is a program, which may raise anything.
        raise FedeltaError(f"the tokenizer's chat template fails: {in_one_line(error)}") from error
    return chat["input_ids"] if tokens else chat
