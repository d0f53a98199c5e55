"""New prompts for a language model: whole texts, chats, or columns that fill the template of a run's prompts."""

from collections.abc import Iterable, Mapping
from numbers import Number
from typing import Any, NamedTuple

from fedelta.errors import FedeltaError, listed
from fedelta.learning.tasks import Completion
from fedelta.learning.tasks.chat_cells import read_asked

ANSWER = "answer"
"""Key of the answer in what `fedelta generate` writes."""


class Prompt(NamedTuple):
    """A prompt as it was given.

    Args:
        place: its name in messages, such as a file and line.
        row: `prompt`, a whole prompt; `messages` of a chat; or columns.
        whole: whether `prompt` is a whole prompt. None decides by the template of the run's prompts: a row that has all
            of its columns fills it.
    """

    place: str
    row: Mapping[str, Any]
    whole: bool | None = None


class Question(NamedTuple):
    """A prompt that is ready for the model.

    Args:
        place: its name in messages.
        row: the row as it was given.
        text: the whole prompt; None for a row with the messages of a chat.
    """

    place: str
    row: Mapping[str, Any]
    text: str | None


def read_prompts(prompts: Iterable[Prompt], task: Any, result: str) -> list[Question]:
    """Check prompts and fill the template of the run's prompts, for which no model is needed.

    Args:
        prompts: the prompts.
        task: the task of the run; None if it is not known.
        result: name of the result in messages.

    Raises:
        FedeltaError: naming the prompt, and what is wrong with it.
    """
    questions = []
    for prompt in prompts:
        try:
            questions.append(Question(prompt.place, prompt.row, _text(prompt, task, result)))
        except FedeltaError as error:
            raise FedeltaError(f"{prompt.place}: {error}") from error
    return questions


def _text(prompt: Prompt, task: Any, result: str) -> str | None:
    row, columns = prompt.row, task.prompt_columns if isinstance(task, Completion) else []
    fills = prompt.whole is False or (prompt.whole is None and columns and all(name in row for name in columns))
    if fills or not ("prompt" in row or "messages" in row):
        return checked_text(fill_prompt(task, row, result))
    if "prompt" not in row:
        read_asked(row["messages"])
        return None
    if not isinstance(row["prompt"], str):
        raise FedeltaError(f"prompt is a {type(row['prompt']).__name__}, expected text")
    return checked_text(row["prompt"])


def checked_text(text: str) -> str:
    """Return a prompt that is not empty and that a tokenizer can read.

    Raises:
        FedeltaError: if it is not.
    """
    if not text.strip():
        raise FedeltaError("an empty prompt")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FedeltaError(f"character {error.start + 1} is not valid Unicode") from error
    return text


def fill_prompt(task: Any, columns: Mapping[str, Any], result: str) -> str:
    """Fill the template of a run's prompts with columns.

    Args:
        task: the task of the run; None if it is not known.
        columns: column → value. Other columns than those of the template are ignored.
        result: name of the result in messages.

    Raises:
        FedeltaError: if the task has no such template, or a column of it is missing or can't be in a prompt.
    """
    if not isinstance(task, Completion):
        raise FedeltaError(f"{result}: no template of prompts is known, so columns can't fill it; pass whole prompts")
    wanted = task.prompt_columns
    if missing := [name for name in wanted if name not in columns]:
        raise FedeltaError(
            f"{result}: its prompts need {'the column' if len(wanted) == 1 else 'the columns'} {listed(wanted)}, "
            f"but {listed(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        )
    values = {name: columns[name] for name in wanted}
    for name, value in values.items():
        if not (value is None or isinstance(value, str | Number)):
            raise FedeltaError(f"column {name} is a {type(value).__name__}, expected text or a number")
    texts = {name: "" if value is None else value for name, value in values.items()}
    if texts and not any(str(text).strip() for text in texts.values()):
        raise FedeltaError(f"no text in {'column' if len(wanted) == 1 else 'the columns'} {listed(wanted)}")
    return task.prompt.format(**texts)
