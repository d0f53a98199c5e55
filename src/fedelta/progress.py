"""Progress on a terminal: rounds with the time left, the clients of the round, evaluation. Quiet elsewhere."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedelta.engines import Observer


class TerminalProgress(Observer):
    """Shows a run, or the runs of a comparison, as bars.

    Args:
        console: bars appear only if it is a terminal; warnings always do.
        runs: number of runs that will follow one another.
    """

    def __init__(self, console: Console, runs: int = 1) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.runs: TaskID | None = self._task("runs", runs) if runs > 1 else None
        self.rounds = self._task("rounds", 1)
        self.clients = self._task("clients", 1)
        self.evaluation = self._task("evaluation", 1, visible=False)

    def _task(self, name: str, total: int, **options: Any) -> TaskID:
        return self.progress.add_task(name, total=total, note="", **options)

    def __enter__(self) -> "TerminalProgress":
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def run_started(self, title: str, done: int, rounds: int) -> None:
        self.progress.reset(self.rounds, total=rounds, completed=done, note=title)

    def clients_started(self, round: int, clients: int) -> None:  # noqa: ARG002
        self.progress.update(self.evaluation, visible=False)
        self.progress.reset(self.clients, total=clients, note="")

    def client_done(self, client: str) -> None:
        self.progress.update(self.clients, advance=1, note=client)

    def evaluation_started(self, split: str, texts: int) -> None:
        self.progress.reset(self.evaluation, total=texts, note=split, visible=True)

    def evaluation_advanced(self, texts: int) -> None:
        self.progress.update(self.evaluation, advance=texts)

    def round_done(self, record: Any) -> None:
        self.progress.update(self.rounds, advance=1)
        if record["validation"]:
            accuracy = 100 * record["validation"]["accuracy"]
            self.progress.update(self.clients, note=f"validation accuracy {accuracy:.2f} %")

    def run_done(self) -> None:
        if self.runs is not None:
            self.progress.update(self.runs, advance=1)

    def warn(self, message: str) -> None:
        self.console.print(f"[yellow]warning:[/yellow] {message}", highlight=False, soft_wrap=True)
