"""Exceptions of fedelta. Each error is one line that says what was found and what was expected."""


class FedeltaError(Exception):
    """Invalid input. The text is one line; the command line prints it and exits with code 2."""


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


MAX_REASON_CHARACTERS = 1000
"""Number of characters kept of a text that another process wrote."""


def one_line(text: object) -> str:
    """Return text from another process as one printable line of at most `MAX_REASON_CHARACTERS` characters."""
    printable = "".join(c if c.isprintable() else " " for c in str(text)[:MAX_REASON_CHARACTERS])
    return " ".join(printable.split())


def in_one_line(error: Exception) -> str:
    """Return an error as one line. Errors that are not a `FedeltaError` are prefixed with their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FedeltaError) else f"{type(error).__name__}: {text}"


def quantity(number: int, noun: str) -> str:
    """A number with its noun: `1 round`, `2 rounds`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
