"""Progress bars on a terminal: rounds with the time left, clients of the round, evaluation. Elsewhere only messages."""

import threading
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

from fedelta.cli.interruption import Interruption
from fedelta.errors import quantity
from fedelta.federation.engines import Observer
from fedelta.learning.tasks.metrics import METRICS
from fedelta.runs.config import Config
from fedelta.sweep.observer import SweepObserver


class TimeLeft(ProgressColumn):
    """Time used and time left, by the mean pace since the bar started.

    Rich's own estimate (`TimeRemainingColumn`, `Task.speed`) needs two steps, ignores the first one, and counts steps
    that a resumed run had finished before. A run of few long rounds would have no estimate for most of its time.
    """

    def render(self, task: Task) -> Text:
        left = time_left(task)
        used = timedelta(seconds=round(task.elapsed or 0.0))
        return Text(f"{used}, {'-:--:--' if left is None else left} left")


def time_left(task: Task) -> timedelta | None:
    """Estimate the remaining time of a task by its mean pace; None before its first step.

    The field `before` of a task is the number of steps that were finished before it started; they have no pace.
    """
    steps = task.completed - task.fields.get("before", 0)
    return timedelta(seconds=round((task.elapsed or 0.0) / steps * (task.remaining or 0))) if steps > 0 else None


@contextmanager
def progress_bar(console: Console, noun: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal.

    Args:
        noun: what the bar counts.

    Yields:
        A function of (done, total) that moves the bar.
    """
    with _bars(console, noted=False) as progress:
        task = progress.add_task(noun, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _bars(console: Console, noted: bool = True) -> Progress:
    """Bars that appear only on a terminal; with `noted`, each has the fields `note` and `before`."""
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeLeft()]
    if noted:
        columns.append(TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


class MessagePrinter(Observer):
    """Print messages and warnings of a run, and nothing else."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, message: str) -> None:
        self.console.print(escape(message), highlight=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        self.console.print(f"[yellow]warning:[/yellow] {escape(message)}", highlight=False, soft_wrap=True)


class GridProgress(SweepObserver):
    """Show the progress of a grid: bars on a terminal, a line per finished cell elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = _bars(console)
        self._cells = self.progress.add_task("cells", total=None, note="", before=0)
        self._rounds = self.progress.add_task("rounds", total=None, note="", before=0)
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._lock = threading.Lock()
        self._rounds_left: dict[str, int] = {}
        self._finished_rounds = 0
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
            self._running = running
            self._rounds_left = {key: cells[key].rounds for key in left}
            self._finished_rounds = sum(config.rounds for key, config in cells.items() if key not in left)
            total = sum(config.rounds for config in cells.values())
            done = len(cells) - len(left)
            # Rounds that an interrupted cell had finished earlier say nothing about the pace.
            before = self._finished_rounds + self._running_rounds()
            self.progress.reset(self._cells, total=len(cells), completed=done, before=done, note="", description=what)
            self.progress.reset(self._rounds, total=total, completed=before, before=before, note="")
        self.say(f"{what}: {len(left)} of {quantity(len(cells), 'cell')} to run")

    def cell_done(self, key: str, name: str, row: Mapping[str, Any]) -> None:
        with self._lock:
            self._finished_rounds += self._rounds_left.pop(key)
            self.progress.update(self._cells, advance=1, note=name)
        if not self.console.is_terminal:
            score = "diverged"
            if row["validation"]:
                metric = METRICS[row["metric"]]
                score = f"validation {metric.title} {metric.format(row['validation'][metric.name])}"
            task = self.progress.tasks[self._cells]
            self.say(f"{task.completed} of {task.total}: {name}: {score}; {time_left(task)} left")

    def say(self, message: str) -> None:
        self.console.print(escape(message), highlight=False, soft_wrap=True)

    def _running_rounds(self) -> int:
        """Finished rounds of the cells that are running, counted in their files: each cell has a process of its own."""
        rounds = 0
        for key in self._rounds_left:
            with suppress(OSError):
                rounds += (self._running / key / "rounds.jsonl").read_bytes().count(b"\n")
        return rounds

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            with self._lock:
                self.progress.update(self._rounds, completed=self._finished_rounds + self._running_rounds())


class TerminalProgress(MessagePrinter):
    """Show a run, or the runs of a comparison, as bars.

    Args:
        console: bars appear only if it is a terminal; warnings always appear. None writes to standard error.
        all_rounds: total rounds of the runs that follow one another; None for a single run.
    """

    def __init__(self, console: Console | None = None, all_rounds: int | None = None) -> None:
        console = console or Console(stderr=True)
        super().__init__(console)
        self.progress = _bars(console)
        self.all = self._task("all runs", all_rounds) if all_rounds is not None else None
        self.rounds = self._task("rounds", None)
        self.clients = self._task("clients", None)
        self.evaluation = self._task("evaluation", None, visible=False)
        self._interruption = Interruption()

    def _task(self, name: str, total: int | None, **options: Any) -> TaskID:
        return self.progress.add_task(name, total=total, note="", before=0, **options)

    def __enter__(self) -> "TerminalProgress":
        self._interruption.__enter__()
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        self._interruption.__exit__()

    def run_started(self, title: str, done: int, rounds: int) -> None:
        self.progress.reset(self.rounds, total=rounds, completed=done, note=title, before=done)
        if self.all is not None:
            before = self.progress.tasks[self.all].fields["before"]
            self.progress.update(self.all, advance=done, before=before + done)

    def clients_started(self, round: int, clients: int) -> None:  # noqa: ARG002
        self.progress.update(self.evaluation, visible=False)
        self.progress.reset(self.clients, total=clients, note="")

    def client_done(self, client: str) -> None:
        self._interruption.check()
        self.progress.update(self.clients, advance=1, note=client)

    def evaluation_started(self, split: str, texts: int) -> None:
        self.progress.reset(self.evaluation, total=texts, note=split, visible=True)

    def evaluation_advanced(self, texts: int) -> None:
        self._interruption.check()
        self.progress.update(self.evaluation, advance=texts)

    def round_done(self, record: Any) -> None:
        self.progress.update(self.rounds, advance=1)
        if self.all is not None:
            self.progress.update(self.all, advance=1)
        if record["validation"]:
            metric = METRICS[record["metric"]]
            score = metric.format(record["validation"][metric.name])
            self.progress.update(self.clients, note=f"validation {metric.title} {score}")
