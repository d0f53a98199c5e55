"""Progress on a terminal: rounds with the time left, the clients of the round, evaluation. Quiet elsewhere."""

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from fedelta.federation.engines import Observer
from fedelta.learning.tasks.metrics import METRICS
from fedelta.runs.config import Config
from fedelta.sweep.observer import SweepObserver


class TimeLeft(ProgressColumn):
    """Time used and time left, by the mean pace so far.

    Rich's own column looks back half a minute, in which a round may not end.
    """

    def render(self, task: Task) -> Text:
        used = task.elapsed or 0.0
        done = task.completed - task.fields.get("before", 0)
        left = timedelta(seconds=round(used / done * (task.remaining or 0))) if done > 0 else "-:--:--"
        return Text(f"{timedelta(seconds=round(used))}, {left} left")


@contextmanager
def counted(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal for work that says how much of it is done: a function of (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeLeft())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _bars(console: Console) -> Progress:
    """Bars that appear only on a terminal, each with the fields `note` and `before`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeLeft())
    note = TextColumn("{task.fields[note]}")
    return Progress(*columns, note, console=console, disable=not console.is_terminal, transient=True)


class Lines(Observer):
    """Shows what is said, and nothing else."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, message: str) -> None:
        self.console.print(escape(message), highlight=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        self.console.print(f"[yellow]warning:[/yellow] {escape(message)}", highlight=False, soft_wrap=True)


class GridProgress(SweepObserver):
    """Shows a grid: bars where there is a terminal, a line for each cell where there is none."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = _bars(console)
        self._cells = self.progress.add_task("cells", total=None, note="", before=0)
        self._rounds = self.progress.add_task("rounds", total=None, note="", before=0)
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._lock = threading.Lock()
        self._left: dict[str, int] = {}
        self._all = self._finished = self._new = 0
        self._begin = time.monotonic()
        self._running = Path()

    def __enter__(self) -> "GridProgress":
        self.progress.start()
        self._watcher.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._watcher.join()
        self.progress.stop()

    def planned(self, what: str, cells: Mapping[str, Config], left: Collection[str], running: Path) -> None:
        with self._lock:
            self._running, self._all = running, len(cells)
            self._left = {key: cells[key].rounds for key in left}
            self._finished = sum(config.rounds for key, config in cells.items() if key not in left)
            self._new, self._begin = 0, time.monotonic()
            total = sum(config.rounds for config in cells.values())
            done = len(cells) - len(left)
            # What an interrupted cell had done before is no pace of now.
            before = self._finished + sum(self._under_way().values())
            self.progress.reset(self._cells, total=len(cells), completed=done, before=done, note="", description=what)
            self.progress.reset(self._rounds, total=total, completed=before, before=before, note="")
        self.say(f"{what}: {len(left)} of {len(cells)} cells to run")

    def cell_done(self, key: str, name: str, row: Mapping[str, Any]) -> None:
        with self._lock:
            self._finished += self._left.pop(key)
            self._new += 1
            done = self._all - len(self._left)
            self.progress.update(self._cells, completed=done, note=name)
        if not self.console.is_terminal:
            score = "diverged"
            if row["validation"]:
                metric = METRICS[row["metric"]]
                score = f"validation {metric.title} {metric.format(row['validation'][metric.name])}"
            pace = (time.monotonic() - self._begin) / self._new
            left = timedelta(seconds=round(pace * len(self._left)))
            self.say(f"{done} of {self._all}: {name}: {score}; {left} left")

    def say(self, message: str) -> None:
        self.console.print(escape(message), highlight=False, soft_wrap=True)

    def _under_way(self) -> dict[str, int]:
        """Finished rounds of each cell that has begun, from its file: it runs in a process of its own."""
        found = {}
        for key in self._left:
            with suppress(OSError):
                found[key] = (self._running / key / "rounds.jsonl").read_bytes().count(b"\n")
        return found

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            with self._lock:
                rounds = self._finished + sum(self._under_way().values())
                self.progress.update(self._rounds, completed=rounds)


class TerminalProgress(Lines):
    """Shows a run, or the runs of a comparison, as bars.

    Args:
        console: bars appear only if it is a terminal; warnings always do.
        all_rounds: rounds of all the runs that will follow one another; None for a single run.
    """

    def __init__(self, console: Console, all_rounds: int | None = None) -> None:
        super().__init__(console)
        self.progress = _bars(console)
        self.all = self._task("all runs", all_rounds) if all_rounds is not None else None
        self.rounds = self._task("rounds", None)
        self.clients = self._task("clients", None)
        self.evaluation = self._task("evaluation", None, visible=False)
        self._interrupted = False
        self._handler: Any = None

    def _task(self, name: str, total: int | None, **options: Any) -> TaskID:
        return self.progress.add_task(name, total=total, note="", before=0, **options)

    def __enter__(self) -> "TerminalProgress":
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)

    def _interrupt(self, *_: Any) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def _stop_if_interrupted(self) -> None:
        """Ctrl-C may have hit a library where it catches everything; then the next thing that is told ends the run."""
        if self._interrupted:
            raise KeyboardInterrupt

    def run_started(self, title: str, done: int, rounds: int) -> None:
        self.progress.reset(self.rounds, total=rounds, completed=done, note=title, before=done)
        if self.all is not None:
            before = next(task.fields.get("before", 0) for task in self.progress.tasks if task.id == self.all)
            self.progress.update(self.all, advance=done, before=before + done)

    def clients_started(self, round: int, clients: int) -> None:  # noqa: ARG002
        self.progress.update(self.evaluation, visible=False)
        self.progress.reset(self.clients, total=clients, note="")

    def client_done(self, client: str) -> None:
        self._stop_if_interrupted()
        self.progress.update(self.clients, advance=1, note=client)

    def evaluation_started(self, split: str, texts: int) -> None:
        self.progress.reset(self.evaluation, total=texts, note=split, visible=True)

    def evaluation_advanced(self, texts: int) -> None:
        self._stop_if_interrupted()
        self.progress.update(self.evaluation, advance=texts)

    def round_done(self, record: Any) -> None:
        self.progress.update(self.rounds, advance=1)
        if self.all is not None:
            self.progress.update(self.all, advance=1)
        if record["validation"]:
            metric = METRICS[record["metric"]]
            score = metric.format(record["validation"][metric.name])
            self.progress.update(self.clients, note=f"validation {metric.title} {score}")
