"""Answers of a conversation in the text that a model sees when it writes each of them, by the tokenizer's own template.

An answer is rendered as the last message, after the text that begins its turn. Many templates write it in the same way
when more messages follow, so one text holds all answers. Others rewrite earlier turns: Qwen 3 leaves out their
thoughts, and Mistral moves the tools to the last turn of the user. Then a conversation becomes several texts, and each
answer is trained in one in which everything before it is as the model sees it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fedelta.errors import FedeltaError, one_line
from fedelta.learning.tasks.chat_rows import Chat
from fedelta.learning.tasks.chat_template import ChatTemplate, Spans


class Answer(NamedTuple):
    """An answer in its text.

    Args:
        message: index of the message.
        text: text up to and including the token that ends the answer.
        begin: length of the text from which the answer is generated, in characters.
        trained: parts of the answer that are trained: all of it, or those in the template's `generation` blocks.
    """

    message: int
    text: str
    begin: int
    trained: Spans

    @property
    def question(self) -> str:
        """Text from which the answer is generated."""
        return self.text[: self.begin]


class Answers:
    """Renders the answers of conversations.

    Args:
        tokenizer: tokenizer with a chat template.
        date: date that a template sees as today's.
        end: token that usually ends an answer.
    """

    def __init__(self, tokenizer: Any, date: str, end: int) -> None:
        self._template = ChatTemplate(tokenizer, date)
        self._end = str(tokenizer.convert_ids_to_tokens(end))
        self._special = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())} - {""}
        self._written: set[str] = set()

    def question(self, chat: Chat, message: int) -> str:
        """The text from which the answer with this index is generated."""
        return self._template.render(chat.messages[:message], True, chat.tools)

    def check_written(self, chat: Chat) -> None:
        """Check that the template writes a conversation's system turn, tools and what tools return.

        Some templates leave out what they do not know. Each is checked in the first conversation that has it.

        Raises:
            FedeltaError: if it leaves one of them out.
        """
        last = chat.answers[-1]
        others: dict[str, Chat] = {}
        for role, name in {"system": "the system turn", "tool": "turns of the role tool"}.items():
            if any(message["role"] == role for message in chat.messages[:last]):
                changed = [{**m, "content": m["content"] + "x"} if m["role"] == role else m for m in chat.messages]
                others[name] = replace(chat, messages=changed)
        if chat.tools:
            others["the tools (task.tools: null reads none)"] = replace(chat, tools=None)
        for name, other in others.items():
            if name not in self._written:
                if self.question(chat, last) == self.question(other, last):
                    raise FedeltaError(f"the tokenizer's chat template does not write {name}")
                self._written.add(name)

    def read(self, chat: Chat, message: int) -> Answer | None:
        """Render the answer with this index; None if the template has no `generation` block for it, but for others.

        Raises:
            FedeltaError: if the template fails, changes the text before the answer once it is there, or ends it in no
                way that a model could learn.
        """
        question = self.question(chat, message)
        whole, marked = self._template.render_marked(chat.messages[: message + 1], chat.tools)
        if not whole.startswith(question):
            common = _common_length(question, whole)
            raise FedeltaError(
                "the tokenizer's chat template changes the turns before an answer when the answer follows: "
                f"{one_line(question[common:])[:40]!r} becomes {one_line(whole[common:])[:40]!r}"
            )
        begin, end = len(question), len(question) + self._end_in(whole[len(question) :])
        for call in chat.messages[message].get("tool_calls", ()):
            if call.get("function", call)["name"] not in whole[begin:end]:
                raise FedeltaError("the tokenizer's chat template does not write the tool_calls of an answer")
        if not self._template.marks:
            return Answer(message, whole[:end], begin, [(begin, end)])
        trained = [(max(start, begin), min(stop, end)) for start, stop in marked]
        trained = [(start, stop) for start, stop in trained if start < stop]
        if not trained:
            return None
        if (trained[0][0], trained[-1][1]) != (begin, end):
            raise FedeltaError(
                "the template's generation block is not the answer that a model writes: it has "
                f"{one_line(repr(whole[trained[0][0] : trained[-1][1]]))[:50]}, expected "
                f"{one_line(repr(whole[begin:end]))[:50]}"
            )
        return Answer(message, whole[:end], begin, trained)

    def special_before(self, text: str, end: int) -> int:
        """Begin of the special token that ends at this position of a text; the position itself if there is none."""
        return end - max((len(token) for token in self._special if text.endswith(token, 0, end)), default=0)

    def _end_in(self, answer: str) -> int:
        """Position in the text of an answer at which its end token ends, and special tokens that directly follow it."""
        if self._end in answer:
            end = answer.rindex(self._end) + len(self._end)
            while follows := [token for token in self._special if answer.startswith(token, end)]:
                end += max(map(len, follows))
            return end
        # Some templates end a tool call with another token than an answer.
        ends = [answer.rindex(token) + len(token) for token in self._special if token in answer]
        if not ends or answer[max(ends) :].strip():
            raise FedeltaError("the tokenizer's chat template puts no end after the answer")
        return max(ends)


def texts_of(answers: Sequence[Answer]) -> list[list[Answer]]:
    """Divide the answers of a conversation into texts.

    Each text is that of its last answer, and has those earlier answers up to which it is the same.
    """
    texts: list[list[Answer]] = []
    left = list(answers)
    while left:
        text = left[-1].text
        texts.append([answer for answer in left if text.startswith(answer.text)])
        left = [answer for answer in left if not text.startswith(answer.text)]
    return texts[::-1]


def difference(answers: Sequence[Answer]) -> str:
    """Describe where the text of an earlier answer differs from that of the last one."""
    whole = answers[-1].text
    text = next(answer.text for answer in answers if not whole.startswith(answer.text))
    # The difference alone may be a few letters, so that what surrounds it is shown as well.
    begin = max(0, _common_length(text, whole) - 10)
    return f"{one_line(repr(text[begin:])[:32])} becomes {one_line(repr(whole[begin:])[:32])}"


def _common_length(one: str, other: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))
