"""Processes that borrow one warm model: forked for a stretch of work, gone after it.

A fork takes some milliseconds and copies no tensor. A worker therefore never has to be brought up to date: it is
born with the base as it is folded, the adapters and the data of that moment, and what it changes dies with it.
Memory stays shared until it is written, which only an adapter, its gradients and activations are.
"""

import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from fedelta.errors import FedeltaError, in_one_line
from fedelta.federation.engines.process_lifetime import end_with_parent

WINDOW = 16
"""Tasks for each worker among which the most expensive comes first; what waits for its turn is as little as that."""


class Result(NamedTuple):
    """What a task gives: plain facts, and bytes. Both cross a pipe as they are, without pickle."""

    facts: dict[str, Any]
    blobs: Sequence[bytes] = ()


Work = Callable[[int], Result]


class Workers:
    """Runs tasks in some processes, or in this one; where they run changes no bit of what they give.

    Args:
        count: of processes; 1 is this one.
        threads: of torch in each. More than one needs `count` 1: a forked process can't use its parent's.
        fresh: fork one for each task, for tasks so long that what a process gathers would outweigh its birth.
    """

    def __init__(self, count: int, threads: int = 1, fresh: bool = False) -> None:
        if count > 1 and threads > 1:
            raise ValueError("forked workers have one thread each")
        self.count = count
        self.threads = threads
        self.fresh = fresh

    def map(self, work: Work, costs: Sequence[float]) -> Iterator[Result]:
        """As `as_completed`, in order."""
        done: dict[int, Result] = {}
        turn = 0
        with closing(self.as_completed(work, costs)) as results:
            for i, result in results:
                done[i] = result
                while turn in done:
                    yield done.pop(turn)
                    turn += 1

    def as_completed(self, work: Work, costs: Sequence[float]) -> Generator[tuple[int, Result]]:
        """i and work(i) for each i. A worker that dies is replaced, and its task done again, once.

        Args:
            work: depends on nothing but i and on what this process holds now.
            costs: of each task, to any scale: expensive ones start early, so that workers end together.

        Raises:
            FedeltaError: if a task kills its worker twice, or raises in a worker.
        """
        if self.count == 1 or len(costs) < 2:
            torch.set_num_threads(self.threads)
            yield from ((i, work(i)) for i in range(len(costs)))
            return
        pool = _Pool(work, min(self.count, len(costs)), self.fresh)
        try:
            yield from pool.run(_order(costs, WINDOW * self.count))
        finally:
            pool.stop()


def can_fork() -> bool:
    """Whether a process that has loaded a model may be forked: not where a GPU or another system is in play."""
    return hasattr(os, "fork") and os.uname().sysname == "Linux" and not torch.cuda.is_initialized()


def _order(costs: Sequence[float], window: int) -> list[int]:
    """The most expensive first within each window of tasks."""
    order: list[int] = []
    for begin in range(0, len(costs), window):
        order += sorted(range(begin, min(begin + window, len(costs))), key=lambda i: (-costs[i], i))
    return order


class _Pool:
    def __init__(self, work: Work, count: int, fresh: bool) -> None:
        self.work = work
        self.fresh = fresh
        self.busy: dict[Connection, tuple[Any, int]] = {}
        self.idle = [self._fork() for _ in range(count)]

    def _fork(self) -> tuple[Connection, Any]:
        mine, its = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(its, mine, self.work, os.getpid()), daemon=True
        )
        with warnings.catch_warnings():
            # The other thread is that of a progress bar, whose locks a worker never takes.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        its.close()
        return mine, process

    def run(self, order: Sequence[int]) -> Iterator[tuple[int, Result]]:
        waiting = deque(order)
        deaths: Counter[int] = Counter()
        while waiting or self.busy:
            while self.idle and waiting:
                connection, process = self.idle.pop()
                try:
                    connection.send_bytes(str(waiting[0]).encode())
                except OSError:
                    # It died while it had nothing to do.
                    self._bury(connection, process)
                    self.idle.append(self._fork())
                    continue
                self.busy[connection] = process, waiting.popleft()
            finished: list[tuple[int, Result]] = []
            for ready in wait(list(self.busy)):
                assert isinstance(ready, Connection)
                process, i = self.busy[ready]
                try:
                    finished.append((i, _receive(ready)))
                    if self.fresh:
                        # It would not see its connection close: those born after it hold this end too.
                        process.terminate()
                        self._bury(ready, process)
                        self.idle.append(self._fork())
                    else:
                        self.idle.append((ready, process))
                except (EOFError, OSError):
                    self._bury(ready, process)
                    deaths[i] += 1
                    if deaths[i] > 1:
                        raise FedeltaError(
                            f"a worker process died twice at the same work ({_cause(process.exitcode)}); "
                            "with workers=1, or --parallel 1 in a grid, it runs in the main process"
                        ) from None
                    waiting.appendleft(i)
                    self.idle.append(self._fork())
                del self.busy[ready]
            yield from finished

    def _bury(self, connection: Connection, process: Any) -> None:
        connection.close()
        process.join()

    def stop(self) -> None:
        workers = [*self.idle, *((connection, process) for connection, (process, _) in self.busy.items())]
        for connection, process in workers:
            connection.close()
            process.terminate()
        for _, process in workers:
            process.join()


def _cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    hint = ", perhaps out of memory" if -code == signal.SIGKILL else ""
    return f"signal {signal.Signals(-code).name}{hint}"


def _receive(connection: Connection) -> Result:
    facts = json.loads(connection.recv_bytes())
    blobs = [connection.recv_bytes() for _ in range(facts.pop("blobs"))]
    if "error" in facts:
        raise FedeltaError(facts["error"])
    return Result(facts, blobs)


def _serve(connection: Connection, other_end: Connection, work: Work, parent: int) -> None:
    """A worker's life. Ctrl-C reaches it too, but it is the parent that ends it, also by its death."""
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        return  # it died before
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    other_end.close()
    # A progress bar's thread may have held the lock of a stream at the moment of the fork.
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w") for number in (1, 2))
    # A parallel region of OpenMP would wait for threads that the fork left behind.
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        try:
            i = int(connection.recv_bytes())
        except (EOFError, ConnectionError):
            return
        try:
            facts, blobs = work(i)
        except Exception as error:
            facts, blobs = {"error": in_one_line(error)}, ()
            if isinstance(error, FedeltaError):
                facts["error"] = str(error)
        try:
            connection.send_bytes(json.dumps({**facts, "blobs": len(blobs)}).encode())
            for blob in blobs:
                connection.send_bytes(blob)
        except ConnectionError:
            # Nobody is there any more.
            return
