"""Ctrl-C and the signals that stop a service end a command in the same way, with time to clean up."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, ClassVar

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
CLEANUP_S = 30.0
"""Seconds for which a further signal is ignored, so that it does not interrupt the cleanup."""


class Interruption:
    """Raises KeyboardInterrupt inside a `with` block when a signal arrives that ends the process.

    Blocks may be nested. A process that is forked inside the block ends at once, as it would by default. A signal that
    is ignored, as SIGHUP is under nohup, stays ignored.
    """

    _received: ClassVar[tuple[int, float] | None] = None
    _depth: ClassVar[int] = 0

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> "Interruption":
        if Interruption._depth == 0:
            Interruption._received = None
        Interruption._depth += 1
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        Interruption._depth -= 1
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def number(self) -> int | None:
        """Number of the first signal that has arrived, or None."""
        return self._received[0] if self._received else None

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has arrived, in case a library has swallowed the exception."""
        if self.number is not None:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if os.getpid() != self._process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        first = Interruption._received
        if first is not None and time.monotonic() - first[1] < CLEANUP_S:
            return
        Interruption._received = (number if first is None else first[0], time.monotonic())
        raise KeyboardInterrupt
