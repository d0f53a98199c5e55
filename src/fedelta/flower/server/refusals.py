"""The lines that report refused connections, so few that repeated attempts cannot fill a log."""

from fedelta.errors import one_line

REFUSED = "refused"
"""First word of each line."""
MAX_COUNTED = 1000
"""Maximum number of addresses and reasons that are counted."""


class RefusalLog:
    """Prints the 1st, 2nd, 4th, 8th, … refusal of an address for a reason."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], int] = {}

    def add(self, who: str, reason: str, detail: str = "") -> None:
        """Report a refusal.

        Args:
            who: the address, or the name of a known site.
            reason: why it was refused. Refusals for the same reason are counted together.
            detail: what differs from one refusal to the next, appended to the line.
        """
        if len(self._counts) >= MAX_COUNTED:
            self._counts.clear()
        count = self._counts[who, reason] = self._counts.get((who, reason), 0) + 1
        if count & (count - 1) == 0:
            print(one_line(f"{REFUSED} {who} ({count} so far): {reason}{detail}"), flush=True)
