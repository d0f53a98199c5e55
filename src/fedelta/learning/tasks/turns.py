"""Tokens of a prompt and its completion as turns of a chat, and the text of an answer, by the tokenizer's own template.

What a template puts between the begin of an answer's turn and the answer, such as an empty block of thoughts, is part
of what is taught. It is removed from generated answers and from references alike before they are compared.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from fedelta.errors import FedeltaError, one_line
from fedelta.learning.data.cells import RefusedRow
from fedelta.learning.tasks.chat_template import ChatTemplate, common_begin
from fedelta.learning.tasks.plain import Tokens

_NO_CHAT = "; set task.chat: false to train on plain texts"


class Turns:
    """Prompts and completions as turns of a user and an assistant.

    Args:
        tokenizer: tokenizer with a chat template.
        date: date that a template sees as today's.
        advice: end of an error, with a way out.

    Attributes:
        end: special token that ends an answer.

    Raises:
        FedeltaError: if the template fails, puts no end after an answer, or does not write an answer after a prompt.
    """

    def __init__(self, tokenizer: Any, date: str, advice: str = _NO_CHAT) -> None:
        self._tokenizer = tokenizer
        self._advice = advice
        self._template = ChatTemplate(tokenizer, date)
        one, other = ("".join(self._texts("a", answer)[1:]) for answer in ("b", "c"))
        # The common end of both chats follows the answer, and their common begin precedes it.
        after = common_begin(one[::-1], other[::-1])[::-1]
        before = self._encode([common_begin(one, other)])[0]
        self._before = tokenizer.decode(before, skip_special_tokens=True).strip()
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        ends = [token for token in self._encode([after])[0] if token in special]
        if not ends:
            raise FedeltaError(
                f"the tokenizer's chat template puts no special token after an answer, so it has no end{advice}"
            )
        self.end = ends[0]

    def read(self, prompts: Sequence[str], completions: Sequence[str]) -> Iterator[tuple[Tokens, Tokens, Tokens]]:
        """Yield for each text the tokens before the prompt, those from there to the answer, and those of the answer.

        The tokens up to the answer are those from which an answer is generated. The answer includes its end token.

        Raises:
            RefusedRow: if the template fails or changes the prompt's turn once an answer follows.
        """
        begin = self._before_prompts()
        for start in range(0, len(prompts), 1000):
            texts = []
            for row, pair in enumerate(zip(prompts[start:][:1000], completions[start:][:1000], strict=True), start + 1):
                try:
                    texts.append(self._texts(*pair))
                except FedeltaError as error:
                    raise RefusedRow(row - 1, error) from error
            questions = self._encode([question for question, _ in texts])
            wholes = self._encode([question + answer for question, answer in texts])
            for row, (text, question, whole) in enumerate(zip(texts, questions, wholes, strict=True), start + 1):
                # A token may span the end of the prompt and the begin of the answer. Generation sees the prompt alone,
                # so the answer then has tokens of its own.
                joint = whole[: len(question)] == question
                answer = whole[len(question) :] if joint else self._encode([text[1]])[0]
                if self.end not in answer:
                    raise RefusedRow(row - 1, "the tokenizer's chat template puts no end after the answer")
                own = begin if question[: len(begin)] == begin else []
                # A line break may follow the end token; the model need not learn it.
                yield own, question[len(own) :], answer[: len(answer) - answer[::-1].index(self.end)]

    def answer(self, text: str) -> str:
        """The answer in the text of an assistant's turn, without what the template puts before each answer."""
        return text.strip().removeprefix(self._before).strip()

    def _texts(self, prompt: str, completion: str) -> tuple[str, str]:
        """Text up to an answer, and text from there on."""
        user = {"role": "user", "content": prompt}
        question = self._template.render([user], True)
        whole = self._template.render([user, {"role": "assistant", "content": completion}], False)
        if not whole.startswith(question):
            common = len(common_begin(question, whole))
            raise FedeltaError(
                "the tokenizer's chat template changes the prompt's turn when an answer follows it: "
                f"{one_line(question[common:])[:40]!r} becomes {one_line(whole[common:])[:40]!r}{self._advice}"
            )
        return question, whole[len(question) :]

    def _before_prompts(self) -> Tokens:
        """Tokens that the template puts before any prompt: start of text, system turn, header of the user's turn."""
        one, other = self._encode([self._texts(prompt, "c")[0] for prompt in ("a", "b")])
        return one[: next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), 0)]

    def _encode(self, texts: list[str]) -> list[Tokens]:
        encoded: list[Tokens] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return encoded
