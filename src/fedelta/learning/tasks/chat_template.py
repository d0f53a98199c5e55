"""Rendering of chats by the tokenizer's own template, the same for training, generation and lm-evaluation-harness."""

import functools
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import accumulate
from typing import Any

from fedelta.errors import FedeltaError, one_line
from fedelta.learning.tasks.template_sandbox import MARKS, MAX_SIZE, MAX_TEMPLATE, TemplateSandbox, TooMuch

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]] | None
Spans = list[tuple[int, int]]
"""Parts of a text: begin and end of each, in characters."""
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARK = re.compile("|".join(map(re.escape, MARKS)))


class ChatTemplate:
    """A tokenizer's chat template with a fixed date.

    Args:
        tokenizer: tokenizer with a chat template.
        date: date that a template sees as today's, as `2024-07-26`.

    Attributes:
        marks: whether the template has `generation` blocks.
    """

    def __init__(self, tokenizer: Any, date: str) -> None:
        try:
            self._source = str(tokenizer.get_chat_template())
        except ValueError as error:
            raise FedeltaError(f"the tokenizer's chat template fails: {one_line(error)[:150]}") from error
        self._special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        self._date = date
        self.marks = _GENERATION.search(self._source) is not None

    def render(self, messages: Sequence[Message], more: bool, tools: Tools = None) -> str:
        """Render a chat as text.

        Args:
            messages: role and content of each turn.
            more: True begins the turn of an answer.
            tools: JSON schema of each tool that the model may call.

        Raises:
            FedeltaError: if the template fails, or takes more time or memory than any chat needs.
        """
        return _MARK.sub("", self._render(messages, more, tools))

    def render_marked(self, messages: Sequence[Message], tools: Tools = None) -> tuple[str, Spans]:
        """Render a chat as text, and find the parts that the template's `generation` blocks wrote.

        Raises:
            FedeltaError: as `render`.
        """
        pieces = _MARK.split(marked := self._render(messages, False, tools))
        ends = list(accumulate(map(len, pieces)))
        if _MARK.findall(marked) != list(MARKS) * (len(ends) // 2):
            raise FedeltaError("the tokenizer's chat template has generation blocks inside each other")
        return "".join(pieces), list(zip(ends[:-1:2], ends[1:-1:2], strict=True))

    def _render(self, messages: Sequence[Message], more: bool, tools: Tools) -> str:
        try:
            environment, template = _compile(self._source, self._date)
            environment.start()
            pieces, size = [], 0
            for piece in template.generate(
                messages=[dict(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=more,
                **self._special,
            ):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_SIZE:
                    raise TooMuch(f"it makes a text of more than {MAX_SIZE:,} characters")
            return "".join(pieces)
        except FedeltaError:
            raise
        except Exception as error:
            # A template is a program, which may raise anything.
            text = one_line(error)[:150]
            raise FedeltaError(f"the tokenizer's chat template fails: {type(error).__name__}: {text}") from error

    def render_up_to_last(self, messages: Sequence[Message]) -> str:
        """Render a chat up to the end of its last message, so that the message can be continued.

        Raises:
            FedeltaError: as `render`, or if the message is not in the text.
        """
        mark = "\N{OBJECT REPLACEMENT CHARACTER}end of the last message\N{OBJECT REPLACEMENT CHARACTER}"
        *earlier, last = messages
        text = self.render([*earlier, {**last, "content": last["content"] + mark}], False)
        if mark not in text:
            raise FedeltaError("the tokenizer's chat template does not write the last message of a chat")
        return text[: text.rindex(mark)]


@functools.lru_cache(maxsize=8)
def _compile(source: str, date: str) -> tuple[TemplateSandbox, Any]:
    if len(source) > MAX_TEMPLATE:
        raise FedeltaError(f"the tokenizer's chat template has {len(source):,} characters, expected {MAX_TEMPLATE:,}")
    environment = TemplateSandbox(datetime.fromisoformat(date))
    return environment, environment.from_string(source)


def common_begin(one: str, other: str) -> str:
    """The text with which both texts begin."""
    return one[
        : next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))
    ]
