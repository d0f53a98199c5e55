"""Answers of a conversation in the text that a model sees when it writes each of them, by the tokenizer's own template.

An answer is rendered as the last message, after the text that begins its turn. Many templates write it in the same way
when more messages follow, so one text holds all answers. Others rewrite earlier turns: Qwen 3 leaves out their
thoughts, and Mistral moves the tools to the last turn of the user. Then a conversation becomes several texts, and each
answer is trained in one in which everything before it is as the model sees it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fedelta.errors import FedeltaError, one_line
from fedelta.learning.tasks.chat_rows import Chat
from fedelta.learning.tasks.chat_template import ChatTemplate, Spans, common_begin


class Answer(NamedTuple):
    """An answer in its text.

    Args:
        message: index of the message.
        text: text up to and including the token that ends the answer.
        begin: length of the text from which the answer is generated, in characters.
        trained: parts of the answer that are trained: all of it, or those in the template's `generation` blocks.
        unwritten: keys of the message, such as `reasoning_content`, whose text the template does not write.
    """

    message: int
    text: str
    begin: int
    trained: Spans
    unwritten: tuple[str, ...] = ()

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
        self._unwritten: dict[Any, tuple[str, ...]] = {}

    def question(self, chat: Chat, message: int) -> str:
        """The text from which the answer with this index is generated."""
        return self._template.render(chat.messages[:message], True, chat.tools)

    def _check_written(self, chat: Chat, message: int) -> tuple[str, ...]:
        """Check that the template writes what an answer is generated from, and the answer.

        Some templates leave out what they do not know, such as a system turn in the middle. What they write depends on
        the shape of a conversation, so it is checked once for each, with a mark at the end of each text. Earlier turns
        of the assistant are not checked: many templates leave out their thoughts on purpose.

        Returns:
            Keys of the answer, such as `reasoning_content`, whose text the template does not write.

        Raises:
            FedeltaError: if the template leaves out an earlier turn, the tools, or the answer's content.
        """
        messages = chat.messages[: message + 1]
        shape = (
            *((m["role"], "tool_calls" in m, _is_text(m, "content")) for m in messages),
            *sorted(key for key in messages[-1] if _is_text(messages[-1], key)),
            bool(chat.tools),
            chat.added,
        )
        if shape not in self._unwritten:
            self._unwritten[shape] = self._find_unwritten(chat, messages)
        return self._unwritten[shape]

    def _find_unwritten(self, chat: Chat, messages: list[dict[str, Any]]) -> tuple[str, ...]:
        """As `_check_written`, for the messages up to an answer."""
        marked, last = [], len(messages) - 1
        for i, message in enumerate(messages):
            # Templates may check or compare other keys of earlier turns, such as `tool_call_id`.
            keys = [key for key in (message if i == last else ("content",)) if key != "role" and _is_text(message, key)]
            marked.append({**message, **{key: message[key] + _mark(i, key) for key in keys}})
        text = self._template.render(marked, False, chat.tools)
        unwritten = "the tokenizer's chat template does not write"
        for i, message in enumerate(messages):
            role = message["role"]
            if (role != "assistant" or i == last) and _is_text(message, "content") and _mark(i, "content") not in text:
                turn = i + 1 - chat.added
                if i == last and message.get("tool_calls"):
                    raise FedeltaError(f"{unwritten} the content of an answer that has tool_calls")
                raise FedeltaError(
                    f"{unwritten} " + (f"turn {turn}, of the role {role}" if turn else "the system turn")
                )
        if chat.tools and text == self._without_tools(marked):
            raise FedeltaError(f"{unwritten} the tools (task.tools: null reads none)")
        answer = messages[last]
        keys = [key for key in answer if key not in ("role", "content") and _is_text(answer, key)]
        return tuple(key for key in keys if _mark(last, key) not in text)

    def _without_tools(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return self._template.render(messages, False)
        except FedeltaError:
            # It refuses calls without tools, so it reads them.
            return None

    def read(self, chat: Chat, message: int) -> Answer | None:
        """Render the answer with this index; None if the template has no `generation` block for it, but for others.

        Raises:
            FedeltaError: if the template fails, changes the text before the answer once it is there, leaves out a part
                of either, or ends the answer in no way that a model could learn.
        """
        question = self.question(chat, message)
        whole, marked = self._template.render_marked(chat.messages[: message + 1], chat.tools)
        if not whole.startswith(question):
            common = len(common_begin(question, whole))
            raise FedeltaError(
                "the tokenizer's chat template changes the turns before an answer when the answer follows: "
                f"{one_line(question[common:])[:40]!r} becomes {one_line(whole[common:])[:40]!r}"
            )
        begin, end = len(question), len(question) + self._end_in(whole[len(question) :])
        for call in chat.messages[message].get("tool_calls", ()):
            if call.get("function", call)["name"] not in whole[begin:end]:
                raise FedeltaError("the tokenizer's chat template does not write the tool_calls of an answer")
        unwritten = self._check_written(chat, message)
        if not self._template.marks:
            return Answer(message, whole[:end], begin, [(begin, end)], unwritten)
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
        return Answer(message, whole[:end], begin, trained, unwritten)

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
    begin = max(0, len(common_begin(text, whole)) - 10)
    return f"{one_line(repr(text[begin:])[:32])} becomes {one_line(repr(whole[begin:])[:32])}"


def _is_text(message: dict[str, Any], key: str) -> bool:
    """Whether a message has a text under this key that is not empty."""
    return isinstance(message.get(key), str) and bool(message[key].strip())


def _mark(message: int, key: str) -> str:
    """A text that no conversation has, and that JSON writes as it is."""
    return f"zq{message}x{key.encode().hex()}qz"
