"""Worker processes that share one loaded model: forked for a list of tasks, ended after it.

A fork takes a few milliseconds and copies no tensor. A worker therefore never needs updates: it starts with the
folded base, the adapters and the data of that moment, and its changes are lost when it ends. Memory stays shared until
it is written, and workers write only adapters, gradients and activations.
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
"""Tasks per worker in a window. Within a window the most expensive task starts first, so no more results than this
wait for their turn."""


class Result(NamedTuple):
    """The result of a task. It crosses a pipe without pickle.

    Args:
        facts: values that JSON can hold.
        blobs: raw bytes.
    """

    facts: dict[str, Any]
    blobs: Sequence[bytes] = ()


Work = Callable[[int], Result]


class Workers:
    """Runs tasks in forked processes or in this one. Results are the same bit by bit.

    Args:
        count: number of processes; 1 runs the tasks in this process.
        threads: torch threads per process. More than one needs `count` 1, because a forked process can't use its
            parent's threads.
        fresh: whether to fork a new process for each task. This is for long tasks, where the memory that a process
            accumulates costs more than another fork.

    Raises:
        ValueError: if both `count` and `threads` are more than 1.
    """

    def __init__(self, count: int, threads: int = 1, fresh: bool = False) -> None:
        if count > 1 and threads > 1:
            raise ValueError("forked workers have one thread each")
        self.count = count
        self.threads = threads
        self.fresh = fresh

    def map(self, work: Work, costs: Sequence[float]) -> Iterator[Result]:
        """Run `as_completed` and yield only the results, in the order of the tasks."""
        done: dict[int, Result] = {}
        next_task = 0
        with closing(self.as_completed(work, costs)) as results:
            for i, result in results:
                done[i] = result
                while next_task in done:
                    yield done.pop(next_task)
                    next_task += 1

    def as_completed(self, work: Work, costs: Sequence[float]) -> Generator[tuple[int, Result]]:
        """Yield i and work(i) for each task i, as tasks complete.

        If a worker dies, it is replaced and its task runs once more.

        Args:
            work: the function to run. It must depend only on i and on the current state of this process.
            costs: cost of each task, in any unit. Expensive tasks start early, so that workers finish together.

        Raises:
            FedeltaError: if a worker dies twice on the same task, or if a task raises in a worker.
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
    """Whether a process with a loaded model can be forked. It must run on Linux and must not have used a GPU."""
    return hasattr(os, "fork") and os.uname().sysname == "Linux" and not torch.cuda.is_initialized()


def _order(costs: Sequence[float], window: int) -> list[int]:
    """Order the tasks so that within each window the most expensive comes first."""
    order: list[int] = []
    for begin in range(0, len(costs), window):
        order += sorted(range(begin, min(begin + window, len(costs))), key=lambda i: (-costs[i], i))
    return order


class _Pool:
    """Forked workers, each at the other end of a pipe. `busy` maps a pipe to its process and its task."""

    def __init__(self, work: Work, count: int, fresh: bool) -> None:
        self.work = work
        self.fresh = fresh
        self.busy: dict[Connection, tuple[Any, int]] = {}
        self.idle = [self._fork() for _ in range(count)]

    def _fork(self) -> tuple[Connection, Any]:
        parent_end, worker_end = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(worker_end, parent_end, self.work, os.getpid()), daemon=True
        )
        with warnings.catch_warnings():
            # Python warns about forking with threads. The other thread draws a progress bar, and a worker never takes
            # its locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        worker_end.close()
        return parent_end, process

    def run(self, order: Sequence[int]) -> Iterator[tuple[int, Result]]:
        waiting = deque(order)
        deaths: Counter[int] = Counter()
        while waiting or self.busy:
            while self.idle and waiting:
                connection, process = self.idle.pop()
                try:
                    connection.send_bytes(str(waiting[0]).encode())
                except OSError:
                    # The worker died while it was idle.
                    self._remove(connection, process)
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
                        # Closing the pipe would not end it: workers forked later have inherited this end.
                        process.terminate()
                        self._remove(ready, process)
                        self.idle.append(self._fork())
                    else:
                        self.idle.append((ready, process))
                except (EOFError, OSError):
                    self._remove(ready, process)
                    deaths[i] += 1
                    if deaths[i] > 1:
                        raise FedeltaError(
                            f"a worker process died twice on the same task ({_cause(process.exitcode)}); "
                            "set workers=1, or --parallel 1 for a grid, to run it in the main process"
                        ) from None
                    waiting.appendleft(i)
                    self.idle.append(self._fork())
                del self.busy[ready]
            yield from finished

    def _remove(self, connection: Connection, process: Any) -> None:
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
    """Run tasks in a worker until the parent closes the pipe.

    The worker ignores Ctrl-C, because the parent ends it. If the parent dies, the worker is killed.

    Args:
        connection: the worker's end of the pipe.
        other_end: the parent's end, closed here.
        work: the function to run for each task.
        parent: the parent's process id.
    """
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        return  # the parent died before the signal was set
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    other_end.close()
    # The thread of a progress bar may have held the lock of a stream during the fork. New streams have new locks.
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w") for number in (1, 2))
    # A parallel region of OpenMP would wait for threads that a fork does not copy.
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
            return  # the parent has closed the pipe
