"""Processes that do not outlive whoever started them, however that ended."""

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent ends."""

# Loaded here: between fork and exec nothing should be.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_holder(lock: Path) -> None:
    """Have this process end when nobody holds a lock any more: for one whose parent is not who started it.

    Args:
        lock: a file that a living `FileLock` holds.
    """

    def watch() -> None:
        while True:
            time.sleep(1)
            # It may be gone with the folder that it was in.
            if lock.exists():
                with suppress(Timeout, OSError), FileLock(lock, timeout=0):
                    os._exit(1)
            else:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_with_parent(number: signal.Signals) -> None:
    """Have this process get a signal when its parent ends, also by kill -9; only Linux can."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, number)
