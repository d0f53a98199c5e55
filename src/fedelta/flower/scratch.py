"""Temporary folders of commands, with sockets and keys for loopback. None is left when a command ends."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

PREFIX = "fedelta-"
LOCK = "in-use.lock"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a temporary folder that only this user can read, and remove it after the block.

    A process that is killed by SIGKILL leaves its folder behind. The next call removes it.
    """
    _remove_abandoned()
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name, FileLock(Path(name) / LOCK):
        yield Path(name)


def _remove_abandoned() -> None:
    """Remove the folders of this user whose processes have ended."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError, Timeout):
            lock = folder / LOCK
            # A folder without the lock is just being made, or is not one of ours.
            if folder.is_symlink() or folder.stat().st_uid != os.getuid() or not lock.exists():
                continue
            with FileLock(lock, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
