"""Exceptions of fedelta, and texts of other programs made safe to print.

Each error is one line that says what was found and what was expected.
"""

from collections.abc import Iterable


class FedeltaError(Exception):
    """Invalid input. The text is one line; the command line prints it and exits with code 2.

    Class attributes:
        kind: what a site tells its server instead of the text, see `protocol/failures.py`.
    """

    kind: str = "input"


class ClientFailed(FedeltaError):
    """A client could not produce an update. The round continues without the client and reports it."""

    def __init__(self, client: str, reason: str) -> None:
        super().__init__(f"client {client}: {reason}")
        self.client = client
        self.reason = reason


class BadUpdate(FedeltaError):
    """A client's update is not usable. Depending on the settings, the server skips the client or stops."""

    def __init__(self, client: str, reason: str) -> None:
        super().__init__(f"client {client}: {reason}")
        self.client = client
        self.reason = reason


class BadBroadcast(FedeltaError):
    """A client can't use what the server sent."""

    kind = "broadcast"


class NotFinite(BadUpdate):
    """An update contains NaN, infinity or numbers too large to compute with: its training has diverged."""


class TooFewUpdates(FedeltaError):
    """A round has fewer usable updates than it needs. The round is repeated, or the run stops.

    Args:
        line: the error text.
        skipped: client → why its update could not be used.
        diverged: True if every skipped client was skipped because its training diverged.
    """

    def __init__(self, line: str, skipped: dict[str, str], diverged: bool = False) -> None:
        super().__init__(line)
        self.skipped = skipped
        self.diverged = diverged


class Diverged(FedeltaError):
    """Training produced values that are not finite. This is a result of the settings, not an error in the input."""


MAX_LINE = 290
"""Maximum number of characters of an error. With the word `error` before it, it is shorter than 300."""
MAX_REASON = 220
"""Maximum number of characters of a text that another process wrote. A line that quotes it still fits `MAX_LINE`."""
CUT = " … "


def printable(text: object, limit: int) -> str:
    r"""Return any text in a form that is safe to print: it may come from a file, a client or a library.

    Line breaks, control characters, escape sequences and characters that reorder or hide text become spaces. A longer
    text loses its middle, because its beginning says what happened and its end often why.

    Args:
        text: the text, or an object whose text is meant.
        limit: maximum number of characters.

    Example:
        >>> printable("\x1b[31mred\x1b[0m", limit=40)
        ' [31mred [0m'
        >>> printable("a" * 100, limit=11)
        'aaaa … aaaa'
    """
    line = str(text)
    if len(line) > limit:
        kept = limit - len(CUT)
        line = f"{line[: kept - kept // 2]}{CUT}{line[len(line) - kept // 2 :]}"
    return "".join(c if c.isprintable() else " " for c in line)


def one_line(text: object, limit: int = MAX_REASON) -> str:
    r"""Return a printable text with single spaces, as a part of a line or an error.

    Example:
        >>> one_line("no\n\n  way")
        'no way'
    """
    # Cut twice: before the spaces are counted, so that a text of gigabytes costs nothing, and after.
    return printable(" ".join(printable(text, 8 * limit).split()), limit)


def in_one_line(error: Exception, limit: int = MAX_LINE) -> str:
    """Return an error as one line. Errors that are not a `FedeltaError` are prefixed with their type."""
    return one_line(error if isinstance(error, FedeltaError) else f"{type(error).__name__}: {error}", limit)


def listed(names: Iterable[object], limit: int = 5) -> str:
    """Return names as a list that stays short: each one in one line of at most 40 characters, the rest counted.

    Example:
        >>> listed(range(8), limit=3)
        '0, 1, 2 and 5 more'
        >>> listed([])
        'none'
    """
    every = list(names)
    shown = ", ".join(one_line(name, 40) for name in every[:limit])
    return f"{shown} and {len(every) - limit} more" if len(every) > limit else shown or "none"


def quantity(number: int, noun: str) -> str:
    """A number with its noun: `1 round`, `2 rounds`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
