"""Cells of messages: a list of messages, or its JSON text."""

import json
from typing import Any

from fedelta.errors import FedeltaError, one_line
from fedelta.learning.data.table import without_none
from fedelta.learning.tasks.chat_message import MessageForm, form_of, read_message


def read_asked(cell: Any) -> list[dict[str, Any]]:
    """Read the messages that an answer shall follow: a list of messages, or its JSON text.

    Raises:
        FedeltaError: naming the turn that can't be read, or if nothing is asked.
    """
    messages = [message for message, _ in read_all(list_in(cell), None)]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        found = f"the last turn is of the {messages[-1]['role']}" if messages else "found no messages"
        raise FedeltaError(f"{found}, expected one of the user to answer")
    return messages


def read_all(values: list[Any], form: MessageForm | None, where: str = "") -> list[tuple[dict[str, Any], bool]]:
    """Read messages. All of a conversation have the same form."""
    read = []
    for turn, value in enumerate(values, 1):
        try:
            form = form or form_of(value)
            read.append(read_message(value, form))
        except FedeltaError as error:
            raise FedeltaError(f"{where}turn {turn}: {error}") from error
    return read


def list_in(cell: Any) -> list[Any]:
    """The list in a cell of messages, which may be JSON text."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError) as error:
            raise FedeltaError(f"found the text {one_line(repr(cell), 60)}, expected messages as JSON") from error
    else:
        cell = without_none(cell)
    if isinstance(cell, dict) and cell and all(isinstance(values, list) for values in cell.values()):
        # `datasets` may hold a list of objects as an object of lists.
        return [without_none(dict(zip(cell, values, strict=False))) for values in zip(*cell.values(), strict=False)]
    if not isinstance(cell, list):
        raise FedeltaError(f"found {one_line(repr(cell), 60)}, expected a list of messages")
    return cell
