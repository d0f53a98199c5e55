"""Tokens of conversations with a label for each, within a maximum length.

A conversation that is too long loses whole turns at its end. If not even the first answer fits, it loses turns after
the system turn instead, as the prompts of a generation do. If that does not suffice either, the text is cut within a
turn: leaving the row out would change which rows a client has, or the test split.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fedelta.errors import FedeltaError
from fedelta.learning.data.examples import IGNORED
from fedelta.learning.tasks.chat_answers import Answer, Answers, texts_of
from fedelta.learning.tasks.chat_rows import Chat
from fedelta.learning.tasks.plain import Tokens, fit


class Text(NamedTuple):
    """A text with its labels.

    Args:
        tokens: token ids.
        labels: for each token, its own id if it is trained, else `IGNORED`.
    """

    tokens: Tokens
    labels: Tokens


class Tokenized(NamedTuple):
    """The tokens of a conversation.

    Args:
        texts: its texts, at least one.
        prompt: tokens from which its last answer is generated.
        answer: tokens of its last answer, in full.
        question: text from which the last answer is generated, in full; equal for equal conversations up to there.
        lost: number of answers that are not in the texts, because they don't fit.
        shortened: whether turns at the begin of a text were left out.
        cut: whether a turn was cut.
        split: the answers, if they are in several texts.
        unmarked: number of answers for which the template has no `generation` block.
        unwritten: keys of answers, such as `reasoning_content`, whose text the template does not write.
    """

    texts: list[Text]
    prompt: Tokens
    answer: Tokens
    question: str
    lost: int
    shortened: bool
    cut: bool
    split: list[Answer]
    unmarked: int
    unwritten: frozenset[str]


class ChatTokens:
    """Turns conversations into tokens.

    Args:
        answers: renders the answers.
        tokenizer: the tokenizer.
        length: maximum number of tokens of a text.
        last: train the last answer of each conversation only.
    """

    def __init__(self, answers: Answers, tokenizer: Any, length: int, last: bool) -> None:
        self._answers = answers
        self._tokenizer = tokenizer
        self._length = length
        self._last = last

    def read(self, chat: Chat) -> Tokenized:
        """Tokenize a conversation.

        Raises:
            FedeltaError: naming the turn, if the template can't write it, or `length` leaves no space for it.
        """
        wanted = chat.answers[-1:] if self._last else chat.answers
        answers = [answer for message in wanted if (answer := self._read(chat, message))]
        if not answers:
            raise FedeltaError("the tokenizer's chat template has no generation block for any of the answers")
        groups = texts_of(answers)
        encoded = [self._encoded(group) for group in groups]
        texts, kept = [], 0
        for text, places, _ in encoded:
            if fitting := [end for _, end in places if end <= self._length]:
                texts.append(Text(text.tokens[: fitting[-1]], text.labels[: fitting[-1]]))
                kept += len(fitting)
        shortened = cut = False
        if not texts:
            text, cut = self._from_the_front(chat, answers[0])
            texts, kept, shortened = [text], 1, not cut
        last = answers[-1]
        whole, places, prompt = encoded[-1]
        last_answer = whole.tokens[slice(*places[-1])]
        if len(prompt) > self._length:
            prompt = self._shorter_prompt(chat, last.message)
        split = answers if len(groups) > 1 else []
        return Tokenized(
            texts,
            prompt,
            last_answer,
            last.question,
            len(answers) - kept,
            shortened,
            cut,
            split,
            len(wanted) - len(answers),
            frozenset(key for answer in answers for key in answer.unwritten),
        )

    def _read(self, chat: Chat, message: int) -> Answer | None:
        try:
            return self._answers.read(chat, message)
        except FedeltaError as error:
            hint = "; task.system or the column system adds a system turn" if chat.added else ""
            raise FedeltaError(f"turn {message + 1 - chat.added}: {error}{hint}") from error

    def _encoded(self, answers: Sequence[Answer]) -> tuple[Text, list[tuple[int, int]], Tokens]:
        """Tokenize the text of the last of these answers, which has all of them.

        Returns:
            Its tokens and labels, the first token of each answer and that after its end, and the tokens from which the
            last answer is generated.
        """
        text = answers[-1].text
        spans = [span for answer in answers for span in answer.trained]
        # What precedes a special token does not change the tokens after it, so that each answer is tokenized from the
        # end of the one before it, and a long conversation takes no longer than its length.
        starts = [0]
        for _, end in spans:
            start = self._answers.special_before(text, end)
            starts.append(start if start < end else starts[-1])
        encoded = self._encode(
            [text[start:place] for start, span in zip(starts, spans, strict=False) for place in span]
        )
        tokens: Tokens = []
        labels: Tokens = []
        places: dict[int, int] = {}
        for i, (begin, end) in enumerate(spans):
            # A token may span the begin of an answer. Generation sees the text up to there alone, so the answer then
            # has tokens of its own.
            question, whole = encoded[2 * i], encoded[2 * i + 1]
            stop = spans[i - 1][1] if i else 0
            known = tokens[-1:] if starts[i] > starts[i - 1] else encoded[2 * i - 1] if i else []
            between = _rest(question, known) or self._encode([text[stop:begin]])[0]
            trained = _rest(whole, question) or self._encode([text[begin:end]])[0]
            places |= {begin: len(tokens) + len(between), end: len(tokens) + len(between) + len(trained)}
            tokens += [*between, *trained]
            labels += [*([IGNORED] * len(between)), *trained]
        last = self._encode([answers[-1].question])[0]
        return Text(tokens, labels), [(places[answer.begin], places[len(answer.text)]) for answer in answers], last

    def _from_the_front(self, chat: Chat, answer: Answer) -> tuple[Text, bool]:
        """The text of an answer without as many turns after the system turn as needed; True if a turn had to be cut."""
        shorter = self._shorter_chats(chat, answer.message)

        def tokens(i: int) -> Text:
            messages = shorter[i]
            read = self._read(messages, len(messages.messages) - 1)
            assert read is not None
            return self._encoded([read])[0]

        first = bisect_left(range(len(shorter)), True, key=lambda i: len(tokens(i).tokens) <= self._length)
        if first < len(shorter):
            return tokens(first), False
        text = tokens(len(shorter) - 1)
        known = next(i for i, label in enumerate(text.labels) if label != IGNORED)
        begin = self._begin(shorter[-1], text.tokens[:known])
        kept, before = fit(begin, text.tokens[len(begin) : known], text.tokens[known:], self._length)
        return Text(kept, [*[IGNORED] * before, *text.labels[known:]][: len(kept)]), True

    def _shorter_prompt(self, chat: Chat, message: int) -> Tokens:
        """Tokens from which an answer is generated, without as many turns after the system turn as needed."""
        shorter = self._shorter_chats(chat, message)

        def tokens(i: int) -> Tokens:
            return self._encode([self._answers.question(shorter[i], len(shorter[i].messages) - 1)])[0]

        first = bisect_left(range(len(shorter)), True, key=lambda i: len(tokens(i)) <= self._length)
        if first < len(shorter):
            return tokens(first)
        prompt = tokens(len(shorter) - 1)
        begin = self._begin(shorter[-1], prompt)
        return fit(begin, prompt[len(begin) :], [], self._length)[0]

    def _shorter_chats(self, chat: Chat, message: int) -> list[Chat]:
        """The conversation up to an answer: whole, without the first exchange, and so on until one turn is left."""
        messages = chat.messages[: message + 1]
        system = messages[:1] if messages[0]["role"] == "system" else []
        starts = [i for i in range(len(system), message) if messages[i]["role"] == "user"]
        starts = [len(system), *(i for i in starts if i > len(system))]
        return [replace(chat, messages=[*system, *messages[start:]]) for start in starts]

    def _begin(self, chat: Chat, question: Tokens) -> Tokens:
        """The tokens before the first turn after the system turn, which a cut text keeps."""
        first = 1 if chat.messages[0]["role"] == "system" else 0
        texts = []
        for content in ("a", "b"):
            messages = list(chat.messages)
            messages[first] = {**messages[first], "content": content}
            texts.append(self._answers.question(replace(chat, messages=messages), len(messages) - 1))
        one, other = self._encode(texts)
        common = next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), 0)
        return question[:common] if question[:common] == one[:common] else []

    def _encode(self, texts: list[str]) -> list[Tokens]:
        encoded: list[Tokens] = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False)[
            "input_ids"
        ]
        return encoded


def _rest(tokens: Tokens, begin: Tokens) -> Tokens:
    """The tokens after those of a beginning; nothing if they do not begin so."""
    return tokens[len(begin) :] if tokens[: len(begin)] == begin else []
