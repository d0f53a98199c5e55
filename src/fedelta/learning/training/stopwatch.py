"""Seconds by phase, and counts of what was done in them."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping


class Stopwatch:
    """Each lap counts the time since the last one for a phase.

    Args:
        finish: called at the end of each lap, to wait for work that is only queued.
    """

    def __init__(self, finish: Callable[[], None] | None = None) -> None:
        self._finish = finish
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: defaultdict[str, int] = defaultdict(int)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Count the time since the last lap for this phase."""
        if self._finish:
            self._finish()
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    def add(self, seconds: Mapping[str, float], counts: Mapping[str, int]) -> None:
        """Count what another stopwatch has measured."""
        for phase, value in seconds.items():
            self.seconds[phase] += value
        for what, number in counts.items():
            self.counts[what] += number
