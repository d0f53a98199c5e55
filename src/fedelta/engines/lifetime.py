"""Processes that do not outlive whoever started them, however that ended."""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent ends."""

# Loaded here: between fork and exec nothing should be.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent(number: signal.Signals) -> None:
    """Have this process get a signal when its parent ends, also by kill -9; only Linux can."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, number)
