"""Conversations in the rows of a data set: its format is found from the columns, and each row becomes a chat."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from fedelta.errors import FedeltaError, one_line
from fedelta.learning.data.cells import IncompleteRow
from fedelta.learning.data.settings import Use
from fedelta.learning.data.table import listed, say, without_none
from fedelta.learning.tasks.chat_cells import list_in, read_all
from fedelta.learning.tasks.chat_message import read_tools
from fedelta.learning.tasks.column_template import fields_of

ChatFormat = Literal["messages", "sharegpt", "alpaca", "prompt-completion"]

MESSAGES = ("messages", "conversations")
"""Columns in which data sets have lists of messages."""
_FIXED: dict[ChatFormat, tuple[str, str]] = {
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
}
SYSTEM, TOOLS, HISTORY = "system", "tools", "history"
"""Columns that are read if a source has them."""


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Args:
        messages: role and content of each message, up to the last answer that is trained.
        answers: messages of the assistant that are trained, by index.
        tools: JSON schema of each tool that the model may call; None without tools.
        left_over: number of messages after the last answer, which are not trained.
        unasked: number of answers that no user asked for, which are not trained.
        own_system: whether the conversation has a system turn of its own, although one is configured.
        added: number of messages that are not in the data: 1 if a system turn was added.
    """

    messages: list[dict[str, Any]]
    answers: list[int]
    tools: list[dict[str, Any]] | None
    left_over: int
    unasked: int
    own_system: bool
    added: int


@dataclass(frozen=True)
class ChatRows:
    """How the rows of a source are read.

    Args:
        format: format of the conversations; None if their messages may have either form.
        column: column of the messages; None for formats with columns of their own.
        user: columns that make the user's turn of `alpaca`. Its column `history`, if there is one, has earlier turns.
        system: template of the system turn of conversations that have none; empty for no system turn.
        tools: column of the tools; None without tools.
        texts: columns of `prompt-completion` whose cells are texts even if one is the JSON of messages.
        history: whether `alpaca` has a column of earlier turns, pairs of a question and its answer.
    """

    format: ChatFormat | None
    column: str | None
    user: tuple[str, ...]
    system: str
    tools: str | None
    history: bool = False
    texts: frozenset[str] = frozenset()

    def for_rows(self, rows: Any) -> "ChatRows":
        """How the rows of a split are read: a text is JSON of messages only if all cells of its column are.

        A model may learn to write JSON, so that one cell alone does not tell.
        """
        texts = set()
        for name in ("prompt", "completion") if self.format == "prompt-completion" else ():
            cells = rows[name][:]
            if found := sum(isinstance(cell, str) and _messages_in(cell) is not None for cell in cells):
                if found < len(cells):
                    texts.add(name)
                    say(f"data: {found} of {len(cells)} cells of {name} are JSON of messages; all are read as texts")
                else:
                    say(f"data: all cells of {name} are JSON of messages, and are read as messages")
        return replace(self, texts=frozenset(texts))

    @property
    def uses(self) -> dict[str, Use]:
        """Columns to read → their use."""
        uses: dict[str, Use] = dict.fromkeys(fields_of(self.system), "cell")
        if self.tools is not None:
            uses[self.tools] = "messages"
        if self.column is not None:
            return uses | {self.column: "messages"}
        if self.format == "alpaca":
            history: dict[str, Use] = {HISTORY: "messages"} if self.history else {}
            return uses | dict.fromkeys((*self.user, "output"), "cell") | history
        return uses | {"prompt": "messages", "completion": "messages"}

    @property
    def required(self) -> tuple[tuple[str, ...], ...]:
        """Groups of columns. A row needs at least one cell of each."""
        if self.column is not None:
            return ((self.column,),)
        if self.format == "alpaca":
            return (self.user, ("output",))
        return (("prompt",), ("completion",))

    def read(self, row: Mapping[str, Any]) -> Chat:
        """Read a row.

        Raises:
            IncompleteRow: if it has no answer to train.
            FedeltaError: naming the turn that can't be read.
        """
        messages, trained, begin = self._messages(row)
        configured = self.system.format(**{name: _cell(row[name]) for name in fields_of(self.system)}).strip()
        own_system = bool(messages) and messages[0]["role"] == "system"
        added = int(bool(configured) and not own_system)
        if added:
            messages = [{"role": "system", "content": configured}, *messages]
            trained, begin = [False, *trained], begin + 1
        asked = next((i for i, message in enumerate(messages) if message["role"] in ("user", "tool")), len(messages))
        every = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= begin]
        answers = [i for i in every if i > asked and trained[i]]
        for i in answers:
            if not messages[i].get("tool_calls") and not messages[i]["content"].strip():
                raise IncompleteRow(f"turn {i + 1 - added}: the assistant's answer is empty")
        if not answers:
            raise IncompleteRow(_without_answer(messages[added:], bool(every), not every or asked > every[-1]))
        return Chat(
            messages[: answers[-1] + 1],
            answers,
            self._tools(row),
            left_over=len(messages) - 1 - every[-1],
            unasked=sum(i < asked and trained[i] for i in every),
            own_system=own_system and bool(configured),
            added=added,
        )

    def _messages(self, row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[bool], int]:
        """The messages of a row, whether the data allow to train each, and the first that may be trained."""
        if self.format == "alpaca":
            question = "\n".join(text for name in self.user if (text := _cell(row[name])).strip())
            pairs = [*(_history(row[HISTORY]) if self.history else ()), (question, _cell(row["output"]))]
            roles = ("user", "assistant")
            messages = [
                {"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)
            ]
            return messages, [True] * len(messages), 0
        if self.column is not None:
            form = self.format if self.format in ("messages", "sharegpt") else None
            read = read_all(list_in(row[self.column]), form)
            return [message for message, _ in read], [trained for _, trained in read], 0
        prompt = read_all(_list_or_text(row["prompt"], "user", "prompt" in self.texts), None, "prompt, ")
        answer = _list_or_text(row["completion"], "assistant", "completion" in self.texts)
        completion = read_all(answer, None, "completion, ")
        if completion and completion[0][0]["role"] != "assistant":
            raise FedeltaError(f"completion, turn 1: role is {completion[0][0]['role']!r}, expected 'assistant'")
        both = prompt + completion
        return [message for message, _ in both], [trained for _, trained in both], len(prompt)

    def _tools(self, row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        cell = without_none(row[self.tools]) if self.tools is not None else None
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            return None
        try:
            return read_tools(cell) or None
        except FedeltaError as error:
            raise FedeltaError(f"column {one_line(self.tools, 40)!r}: {error}") from error


def find_format(
    names: Collection[str], format: ChatFormat | None, column: str | None, system: str | None, tools: str | None
) -> ChatRows:
    """Find the format of a source from the names of its columns.

    Args:
        names: columns of the source.
        format: format that is configured; None finds it.
        column: column of the messages that is configured; None finds it.
        system: template of the system turn; None is the column `system`, if there is one.
        tools: column of the tools. `tools` is read only if there is one. None reads none.

    Raises:
        FedeltaError: if the columns have no format, or several.
    """
    if system is None:
        system = f"{{{SYSTEM}}}" if SYSTEM in names else ""
    if tools == TOOLS and TOOLS not in names:
        tools = None
    columns = [column] if column is not None else [name for name in MESSAGES if name in names]
    if column is None and format is None:
        found = [*columns, *(pair for pair in _FIXED.values() if set(pair) <= set(names))]
    elif format in _FIXED:
        found = [_FIXED[format]]
    else:
        found = list(columns) or [MESSAGES[0]]
    if not found:
        expected = ", or ".join(" and ".join(pair) for pair in _FIXED.values())
        raise FedeltaError(
            f"found columns {listed(names, 6)}, expected {' or '.join(MESSAGES)}, or {expected}; "
            "task.messages names another column of messages"
        )
    if len(found) > 1:
        described = [one if isinstance(one, str) else " and ".join(one) for one in found]
        raise FedeltaError(
            f"the columns have conversations in several formats ({'; '.join(described)}): "
            "set task.format, or task.messages to the column"
        )
    if isinstance(found[0], str):
        return ChatRows(format, found[0], (), system, tools)
    chosen = next(name for name, pair in _FIXED.items() if pair == found[0])
    user = tuple(name for name in ("instruction", "input") if name in names) if chosen == "alpaca" else ()
    return ChatRows(chosen, None, user, system, tools, history=chosen == "alpaca" and HISTORY in names)


def _list_or_text(cell: Any, role: str, text: bool) -> list[Any]:
    """The messages in a cell: a list, its JSON text unless it is to be a `text`, or a text as one message of a role."""
    if not isinstance(cell, str):
        return list_in(cell)
    found = None if text else _messages_in(cell)
    return [{"role": role, "content": cell}] if found is None else found


def _messages_in(cell: str) -> list[Any] | None:
    """The messages whose JSON a cell is; None for any other text, also one that only looks like messages."""
    if not cell.lstrip().startswith("["):
        return None
    try:
        return found if read_all(found := list_in(cell), None) else None
    except FedeltaError:
        return None


def _history(cell: Any) -> list[tuple[str, str]]:
    """The earlier turns in a cell of alpaca's `history`: pairs of a question and its answer, or their JSON text."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return []
    try:
        pairs = json.loads(cell) if isinstance(cell, str) else cell
        if isinstance(pairs, list) and all(
            isinstance(text, str) for question, answer in pairs for text in (question, answer)
        ):
            return [(question, answer) for question, answer in pairs]
    except (ValueError, TypeError, RecursionError):
        # Not JSON, or not pairs.
        pass
    raise FedeltaError(f"history is {one_line(repr(cell), 60)}, expected a list of pairs of a question and its answer")


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def _without_answer(messages: list[dict[str, Any]], answered: bool, unasked: bool) -> str:
    """Why a conversation has nothing to train."""
    if not messages:
        return "an empty conversation"
    if not answered:
        return f"a conversation without an answer of the assistant ({listed(m['role'] for m in messages)})"
    if unasked:
        return "a conversation in which no user's turn comes before an answer of the assistant"
    return "a conversation whose answers are all excluded from training"
