"""Progress on a terminal: rounds with the time left, the clients of the round, evaluation. Quiet elsewhere."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from fedelta.engines import Observer


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


class Lines(Observer):
    """Shows what is said, and nothing else."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, message: str) -> None:
        self.console.print(escape(message), highlight=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        self.console.print(f"[yellow]warning:[/yellow] {escape(message)}", highlight=False, soft_wrap=True)


class TerminalProgress(Lines):
    """Shows a run, or the runs of a comparison, as bars.

    Args:
        console: bars appear only if it is a terminal; warnings always do.
        all_rounds: rounds of all the runs that will follow one another; None for a single run.
    """

    def __init__(self, console: Console, all_rounds: int | None = None) -> None:
        super().__init__(console)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeLeft(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
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
            accuracy = 100 * record["validation"]["accuracy"]
            self.progress.update(self.clients, note=f"validation accuracy {accuracy:.2f} %")
