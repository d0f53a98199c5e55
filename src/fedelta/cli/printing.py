"""The one place that prints text which may come from elsewhere: names of files and clients, log lines, error texts."""

from rich.console import Console
from rich.text import Text

from fedelta.errors import MAX_LINE, one_line, printable

MAX_MESSAGE = 1000
"""Maximum number of characters of a message."""
MAX_PATH = 4096
"""Maximum number of characters of a line with a path, which is cut only where no file could exist."""
MAX_NOTE = 60
"""Maximum number of characters beside a progress bar."""


def print_text(console: Console, text: object, label: str = "", style: str = "", limit: int = MAX_MESSAGE) -> None:
    """Print a text as one line, without markup, escape sequences or control characters.

    Args:
        console: where to print.
        text: the text.
        label: printed before the text in this style, such as `warning:`.
        style: style of the label.
        limit: maximum number of characters of the text; a longer one loses its middle.
    """
    line = Text()
    if label:
        line.append(f"{label} ", style)
    # soft_wrap: a path that is broken over two lines cannot be copied.
    console.print(line.append(printable(text, limit)), highlight=False, soft_wrap=True)


def print_error(console: Console, text: object) -> None:
    """Print an error as one line of less than 300 characters."""
    print_text(console, one_line(text, MAX_LINE), "error:", "red")


def print_warning(console: Console, text: object) -> None:
    """Print a warning as one line."""
    print_text(console, text, "warning:", "yellow")


def print_path(console: Console, what: str, *paths: object) -> None:
    """Print where something was written."""
    print_text(console, f"{what:<9} {' '.join(map(str, paths))}", limit=MAX_PATH)
