"""The one error type: a line for a person, naming what was found and what was expected."""


class FedeltaError(Exception):
    """Bad input. Its text is one clear line; the command line prints it and exits with code 2."""


class ClientFailed(FedeltaError):
    """A client that has no update to show. The round goes on without it, and says so."""

    def __init__(self, client: str, reason: str) -> None:
        super().__init__(f"client {client}: {reason}")
        self.client = client
        self.reason = reason


class BadUpdate(FedeltaError):
    """A client's update that can't be used. The server skips the client or stops, by setting."""

    def __init__(self, client: str, reason: str) -> None:
        super().__init__(f"client {client}: {reason}")
        self.client = client
        self.reason = reason


class NotFinite(BadUpdate):
    """An update with NaN or infinity in it: its training has diverged."""


class TooFewUpdates(FedeltaError):
    """A round with fewer usable updates than it needs; it is tried again, or the run stops.

    Args:
        skipped: client → why its update could not be used.
        diverged: whether all of these were of training that diverged.
    """

    def __init__(self, line: str, skipped: dict[str, str], diverged: bool = False) -> None:
        super().__init__(line)
        self.skipped = skipped
        self.diverged = diverged


class Diverged(FedeltaError):
    """Training that has left the finite numbers. It is a result, of these settings, and no fault of the input."""


MAX_REASON_CHARACTERS = 1000
"""Characters of somebody else's words that are kept."""


def one_line(text: object) -> str:
    """What somebody else wrote, as one line of bounded length that any terminal can show."""
    kept = "".join(c if c.isprintable() else " " for c in str(text)[:MAX_REASON_CHARACTERS])
    return " ".join(kept.split())


def in_one_line(error: Exception) -> str:
    """Any error as one line: ours as they are, others after their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FedeltaError) else f"{type(error).__name__}: {text}"


def quantity(number: int, noun: str) -> str:
    """A number with its noun: `1 round`, `2 rounds`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
