"""Conversation: supervised fine-tuning of a causal language model on chats, with the loss on the assistant's turns."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import field_validator, model_validator

from fedelta.errors import FedeltaError, one_line, quantity
from fedelta.learning.data import Columns, DataSettings
from fedelta.learning.data.cells import RefusedRow
from fedelta.learning.data.examples import Completions
from fedelta.learning.data.table import listed, say
from fedelta.learning.tasks.chat_answers import Answers, difference
from fedelta.learning.tasks.chat_rows import MESSAGES, TOOLS, Chat, ChatFormat, find_format
from fedelta.learning.tasks.chat_tokens import ChatTokens, Tokenized
from fedelta.learning.tasks.column_template import check_template, fields_of
from fedelta.learning.tasks.language import LanguageTask, without_template
from fedelta.learning.tasks.plain import CutWarning
from fedelta.learning.tasks.turns import Turns
from fedelta.settings import nearest


class Conversation(LanguageTask):
    """Predict the assistant's turns of conversations, as the tokenizer's chat template writes them.

    Args:
        format: format of the data: `messages` (role and content), `sharegpt` (from and value), `alpaca` (columns
            instruction, input and output) or `prompt-completion` (columns prompt and completion, texts or messages).
            None finds it from the names of the columns.
        messages: column of the messages. None is `messages` or `conversations`.
        system: system turn of conversations that have none, with columns in braces or without, such as "You work in
            {ward}." None is the content of a column `system`, if there is one. An empty text adds none.
        tools: column with the tools of each conversation: a list of JSON schemas, or its JSON text. The default,
            `tools`, is read only if there is such a column; null reads none.
        train: answers of a conversation that are trained, `all` or the `last` one.
    """

    kind: Literal["conversation"] = "conversation"
    format: ChatFormat | None = None
    messages: str | None = None
    system: str | None = None
    tools: str | None = TOOLS
    train: Literal["all", "last"] = "all"

    @field_validator("system")
    @classmethod
    def _template(cls, template: str | None) -> str | None:
        return None if template is None else check_template(template)

    @model_validator(mode="after")
    def _messages_have_a_column(self) -> "Conversation":
        if self.messages is not None and self.format in ("alpaca", "prompt-completion"):
            raise ValueError(f"format: {self.format} has no column of messages, expected no task.messages")
        return self

    def columns(self, data: DataSettings) -> Columns:  # noqa: ARG002
        # Before the source is read, any column that may be used is one to look for.
        likely = [self.messages] if self.messages else [*MESSAGES, "instruction", "output", "prompt", "completion"]
        return Columns(dict.fromkeys(likely, "messages"), (), self._columns_among)

    def _columns_among(self, names: Any) -> Columns:
        if missing := [name for name in fields_of(self.system or "") if name not in names]:
            hint = nearest(missing[0], names)
            raise FedeltaError(f"task.system: no column {one_line(repr(missing[0]), 40)}, found {listed(names)}{hint}")
        rows = find_format(names, self.format, self.messages, self.system, self.tools)
        own = [name for name in (self.group, self.by) if name]
        system = [tuple(fields_of(self.system))] if self.system and fields_of(self.system) else []
        required = (*rows.required, *system, *((name,) for name in own))

        def check(row: Mapping[str, Any]) -> None:
            rows.read(row)

        return Columns({**dict.fromkeys(own, "cell"), **rows.uses}, required, check=check)

    @property
    def constant_system(self) -> str | None:
        """The system turn of all conversations that have none; None if it depends on the row or on its columns."""
        return None if self.system is None or fields_of(self.system) else self.system.format().strip()

    def turns(self, tokenizer: Any) -> Turns:
        if tokenizer.chat_template is None:
            raise without_template(tokenizer, "task: conversation")
        return Turns(tokenizer, self.date, advice="")

    def examples(self, rows: Any, data: DataSettings, classes: Sequence[str], tokenizer: Any) -> Completions:  # noqa: ARG002
        form = find_format(rows.column_names, self.format, self.messages, self.system, self.tools)
        turns = self.turns(tokenizer)
        tokens = ChatTokens(Answers(tokenizer, self.date, turns.end), tokenizer, data.max_length, self.train == "last")
        chats: list[Chat] = []
        read: list[Tokenized] = []
        names = list(dict.fromkeys([*form.uses, *(name for name in (self.group, self.by) if name)]))
        lines = rows.select_columns(names)
        form = form.for_rows(lines)
        for number, row in enumerate(lines):
            try:
                chats.append(form.read(row))
                read.append(tokens.read(chats[-1]))
            except FedeltaError as error:
                raise RefusedRow(number, error) from error
        if self.system is None and form.system:
            say('data: the column system is the system turn of each conversation; task.system: "" adds none')
        self._say(chats, read, data.max_length)
        groups = lines[self.group][:] if self.group else [one.question for one in read]
        kinds = [str(kind) for kind in lines[self.by][:]] if self.by else []
        references = self._references(chats, read, turns, tokenizer)
        of_text = [row for row, one in enumerate(read) for _ in one.texts]
        texts = [text for one in read for text in one.texts]
        return Completions(
            [{"input_ids": text.tokens} for text in texts],
            [text.labels for text in texts],
            [read[row].prompt for row in of_text],
            [references[row] for row in of_text],
            [str(groups[row]) for row in of_text],
            [kinds[row] for row in of_text] if kinds else (),
            of_text if len(texts) > len(read) else (),
        )

    def _references(self, chats: Sequence[Chat], read: Sequence[Tokenized], turns: Turns, tokenizer: Any) -> list[str]:
        """The last answer of each conversation, as a generated answer becomes a text."""
        references = [str(chat.messages[-1].get("content", "")).strip() for chat in chats]
        if self.generate is not None:
            taught = tokenizer.batch_decode([one.answer for one in read], skip_special_tokens=True)
            for row, (text, one) in enumerate(zip(taught, read, strict=True)):
                if tokenizer.unk_token_id not in one.answer:
                    references[row] = self.answer_text(text, turns)
        return references

    def _say(self, chats: Sequence[Chat], read: Sequence[Tokenized], length: int) -> None:
        """Say what is not trained as it stands in the data, each in one line."""
        every = len(read)
        if left := sum(chat.left_over > 0 for chat in chats):
            say(f"data: {left} of {every} conversations are trained up to their last answer; turns follow it")
        if unasked := sum(chat.unasked > 0 for chat in chats):
            say(f"data: {unasked} of {every} conversations begin with an answer, which is not trained")
        if own := sum(chat.own_system for chat in chats):
            say(f"data: {own} of {every} conversations have a system turn of their own and keep it")
        if unmarked := sum(one.unmarked > 0 for one in read):
            say(
                f"data: {unmarked} of {every} conversations have answers that are not trained, because the chat "
                "template has no generation block for them"
            )
        for key in sorted({key for one in read for key in one.unwritten}):
            number = sum(key in one.unwritten for one in read)
            say(
                f"data: {number} of {every} conversations have answers with {one_line(key, 40)}, which the chat "
                "template does not write, so it is not trained"
            )
        if split := [one for one in read if one.split]:
            texts = sum(len(one.texts) for one in split)
            say(
                f"data: {len(split)} of {every} conversations become {quantity(texts, 'text')}, because the chat "
                f"template writes earlier turns differently once others follow: {difference(split[0].split)}"
            )
        if long := [one for one in read if one.lost or one.shortened or one.cut]:
            effects = {
                "lose turns at their end": sum(one.lost > 0 for one in long),
                "lose turns after their system turn": sum(one.shortened for one in long),
                "are cut within a turn, because not even one answer fits": sum(one.cut for one in long),
            }
            told = ", ".join(f"{number} {effect}" for effect, number in effects.items() if number)
            warnings.warn(
                f"{len(long)} of {every} conversations are longer than data.max_length {length}: {told}",
                CutWarning,
                stacklevel=3,
            )
        if self.generate is not None:
            limit = self.generate.max_new_tokens
            if longer := sum(len(one.answer) > limit for one in read):
                warnings.warn(
                    f"{longer} of {every} last answers are longer than task.generate.max_new_tokens {limit}",
                    CutWarning,
                    stacklevel=3,
                )
