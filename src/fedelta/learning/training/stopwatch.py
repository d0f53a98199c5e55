"""Measurement of the seconds of each phase of a round, and counts of the work done."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping


class Stopwatch:
    """Stopwatch that adds the time of each lap to a phase.

    Args:
        finish: called at the end of each lap, to wait for work that is still queued.

    Attributes:
        seconds: phase → seconds.
        counts: name → number.
    """

    def __init__(self, finish: Callable[[], None] | None = None) -> None:
        self._finish = finish
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: defaultdict[str, int] = defaultdict(int)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to this phase."""
        if self._finish:
            self._finish()
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    def add(self, seconds: Mapping[str, float], counts: Mapping[str, int]) -> None:
        """Add the measurements of another stopwatch."""
        for phase, value in seconds.items():
            self.seconds[phase] += value
        for name, number in counts.items():
            self.counts[name] += number
