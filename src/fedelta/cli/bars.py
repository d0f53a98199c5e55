"""Progress bars that fit the width of the terminal, with the time used and the time left."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from fedelta.errors import one_line


class Bars(Progress):
    """Bars that appear only on a terminal, one line each at every width from 40 columns on.

    Args:
        console: where they are drawn.
        noted: each bar has the fields `note` and `before`; see `time_left`.
    """

    def __init__(self, console: Console, noted: bool = True) -> None:
        self._terminal, self._noted = console, noted
        super().__init__(console=console, disable=not console.is_terminal, transient=True)

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        # The terminal may have another width each time.
        self.columns = _columns(self._terminal.width, self._noted)
        return super().make_tasks_table(tasks)


def _columns(width: int, noted: bool) -> tuple[ProgressColumn, ...]:
    """Columns for a terminal of this width: what does not fit is left out, and the note is cut."""
    bar = 40 if width >= 110 else 20 if width >= 80 else 8
    whole = Column(no_wrap=True)
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False, table_column=whole)]
    if width >= 60:
        columns.append(BarColumn(bar))
    columns += [MofNCompleteColumn(table_column=whole), TimeLeft(used=width >= 80)]
    if noted and width >= 60:
        columns.append(Note())
    return tuple(columns)


class Note(ProgressColumn):
    """The note of a bar, cut to the space that is left."""

    def render(self, task: Task) -> Text:
        return Text(one_line(task.fields["note"]), no_wrap=True, overflow="ellipsis")


class TimeLeft(ProgressColumn):
    """Time used and time left, by the mean pace since the bar started.

    Rich's own estimate (`TimeRemainingColumn`, `Task.speed`) needs two steps, ignores the first one, and counts steps
    that a resumed run had finished before. A run of few long rounds would have no estimate for most of its time.

    Args:
        used: show the time used, too.
    """

    def __init__(self, used: bool) -> None:
        super().__init__(Column(no_wrap=True))
        self._used = used

    def render(self, task: Task) -> Text:
        left = time_left(task)
        used = f"{timedelta(seconds=round(task.elapsed or 0.0))}, " if self._used else ""
        return Text(f"{used}{'-:--:--' if left is None else left} left")


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
    with Bars(console, noted=False) as progress:
        task = progress.add_task(noun, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
