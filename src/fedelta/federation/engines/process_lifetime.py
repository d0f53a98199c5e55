"""End a process when the process that started it ends, for whatever reason that ended."""

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
"""Option of Linux's prctl that sets the signal a process gets when its parent ends."""

# Load the library at import: a library must not be loaded between fork and exec.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_holder(lock: Path) -> None:
    """End this process when no process holds a lock any more.

    This is for a process whose parent is not the process that started it.

    Args:
        lock: the file of a `FileLock` that another process holds.
    """

    def watch() -> None:
        while True:
            time.sleep(1)
            # The file may have been removed together with its folder.
            if lock.exists():
                with suppress(Timeout, OSError), FileLock(lock, timeout=0):
                    os._exit(1)
            else:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_with_parent(number: signal.Signals) -> None:
    """Send this process a signal when its parent ends, even by kill -9. It works only on Linux.

    Args:
        number: the signal.
    """
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, number)
