"""A lock on a folder that one process writes."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fedelta.errors import FedeltaError

HOLD_S = 10.0
"""Seconds that `hold_folder` waits for another process to end."""


@contextmanager
def hold_folder(path: Path, patience: float = HOLD_S) -> Iterator[None]:
    """Lock the folder against other processes while the context is open. A killed process releases its lock.

    Args:
        path: the folder; it is made if it does not exist.
        patience: seconds to wait for another process that is about to end.

    Raises:
        FedeltaError: if another process holds the lock.
    """
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=patience)
    except Timeout as error:
        raise FedeltaError(f"{path}: another process is writing to this run") from error
    try:
        yield
    finally:
        with suppress(OSError):
            # Processes that wait for the lock notice that the file is gone. On systems that can't remove an open
            # file, it stays.
            Path(lock.lock_file).unlink()
        lock.release()
        with suppress(OSError):
            # A run that wrote nothing leaves no folder. rmdir fails on a folder that is not empty.
            for folder in new:
                folder.rmdir()
