"""A chat with a language model on the terminal."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from transformers import TextStreamer

from fedelta.cli.printing import print_text
from fedelta.cli.terminal import err
from fedelta.errors import FedeltaError

YOU = "> "
COMMANDS = "/new starts another chat, /exit ends it"
_COMMAND = re.compile(r"/\w+")


def safe_lines(text: str) -> str:
    r"""Return a text with its line breaks and tabs, and with spaces for all other characters that a terminal obeys.

    Example:
        >>> safe_lines("a\n\x1b[31mb")
        'a\n [31mb'
    """
    return "".join(c if c in "\n\t" or c.isprintable() else " " for c in text)


class Screen(TextStreamer):
    """Shows the text of an answer while it is generated.

    Args:
        tokenizer: the model's tokenizer.
        write: receives the text, piece by piece. None writes to standard output.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], object] | None = None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write or sys.stdout.write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(safe_lines(text) + ("\n" if stream_end else ""))
        sys.stdout.flush()


def chat_on_terminal(writer: Any) -> None:
    """Chat until the end of the input, which is Ctrl-D on a terminal."""
    if not writer.chats:
        raise FedeltaError("--chat needs a model with a chat template")
    if sys.stdin.isatty():
        print_text(err, f"{COMMANDS}, as Ctrl-D does")
    converse(writer, _turns(), sys.stdout.write)


def _turns() -> Iterator[str]:
    """The lines that the user enters."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    # Editing of the line, if Python has it.
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            yield input(YOU)
        except EOFError:
            print()
            return


def converse(writer: Any, turns: Iterable[str], write: Callable[[str], object]) -> list[dict[str, str]]:
    """Answer the turns of a user, each with all turns before it in view.

    Args:
        writer: a `Writer` that chats.
        turns: the user's turns. Empty ones are skipped, `/new` forgets all turns before it, `exit` and `quit` end the
            chat, also with a slash. Other words with a slash before them are refused.
        write: receives the text of the answers.

    Returns:
        The messages of the last chat.
    """
    messages: list[dict[str, str]] = []
    number = 0
    for turn in turns:
        word = turn.strip()
        if not word:
            continue
        if word.removeprefix("/") in ("exit", "quit"):
            break
        if word == "/new":
            messages = []
            continue
        if _COMMAND.fullmatch(word.split()[0]):
            print_text(err, f"{word.split()[0][:40]} is not a command; {COMMANDS}", "note:")
            continue
        asked = [*messages, {"role": "user", "content": turn}]
        try:
            tokens = writer.chat_tokens(asked)
        except FedeltaError as error:
            # The chat so far remains, and a shorter turn may still fit.
            print_text(err, error, "note:")
            continue
        answer = writer.stream(tokens, Screen(writer.tokenizer, write), number)
        messages = [*asked, {"role": "assistant", "content": answer}]
        number += 1
    return messages
