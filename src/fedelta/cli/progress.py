"""Progress of a run: bars for rounds, clients and evaluation on a terminal, and a line per round elsewhere."""

import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import TaskID

from fedelta.cli.bars import Bars, time_left
from fedelta.cli.interruption import Interruption
from fedelta.cli.printing import MAX_NOTE, print_text
from fedelta.errors import printable, quantity
from fedelta.federation.engines import Observer
from fedelta.learning.tasks.metrics import METRICS
from fedelta.runs.config import Config
from fedelta.sweep.observer import SweepObserver


class MessagePrinter(Observer):
    """Print messages and warnings of a run, and nothing else.

    Args:
        console: where they are printed.
        stamped: begin each line with the local time and its offset. None does so unless the console is a terminal.
    """

    def __init__(self, console: Console, stamped: bool | None = None) -> None:
        self.console = console
        self._stamped = not console.is_terminal if stamped is None else stamped

    def say(self, message: str) -> None:
        print_text(self.console, message, self._stamp())

    def warn(self, message: str) -> None:
        print_text(self.console, message, f"{self._stamp()} warning:".lstrip(), "yellow")

    def _stamp(self) -> str:
        return datetime.now().astimezone().isoformat(timespec="seconds") if self._stamped else ""


class GridProgress(SweepObserver):
    """Show the progress of a grid: bars on a terminal, a line per finished cell elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Bars(console)
        self._printer = MessagePrinter(console)
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
            self.progress.update(self._cells, advance=1, note=printable(name, MAX_NOTE))
        if not self.console.is_terminal:
            score = "diverged"
            if row["validation"]:
                score = _score(row)
            task = self.progress.tasks[self._cells]
            self.say(f"{task.completed} of {task.total}: {name}: {score}; {time_left(task)} left")

    def say(self, message: str) -> None:
        self._printer.say(message)

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
    """Show a run, or the runs of a comparison: bars on a terminal, elsewhere a line per round.

    Args:
        console: where it is shown. None is standard error.
        all_rounds: total rounds of the runs that follow one another; None for a single run.
        stamped: as for `MessagePrinter`.
    """

    def __init__(
        self, console: Console | None = None, all_rounds: int | None = None, stamped: bool | None = None
    ) -> None:
        console = console or Console(stderr=True)
        super().__init__(console, stamped)
        self.progress = Bars(console)
        self._round_began = time.monotonic()
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
        self._round_began = time.monotonic()
        if not self.console.is_terminal:
            before = f", {done} of them finished before" if done else ""
            self.say(f"{title}: {quantity(rounds, 'round')}{before}")
        self.progress.reset(self.rounds, total=rounds, completed=done, note=printable(title, MAX_NOTE), before=done)
        if self.all is not None:
            before = self.progress.tasks[self.all].fields["before"]
            self.progress.update(self.all, advance=done, before=before + done)

    def clients_started(self, round: int, clients: int) -> None:  # noqa: ARG002
        self.progress.update(self.evaluation, visible=False)
        self.progress.reset(self.clients, total=clients, note="")

    def client_done(self, client: str) -> None:
        self._interruption.check()
        self.progress.update(self.clients, advance=1, note=printable(client, MAX_NOTE))

    def evaluation_started(self, split: str, texts: int) -> None:
        self.progress.reset(self.evaluation, total=texts, note=printable(split, MAX_NOTE), visible=True)

    def evaluation_advanced(self, texts: int) -> None:
        self._interruption.check()
        self.progress.update(self.evaluation, advance=texts)

    def round_done(self, record: Any) -> None:
        self.progress.update(self.rounds, advance=1)
        if self.all is not None:
            self.progress.update(self.all, advance=1)
        if record["validation"]:
            self.progress.update(self.clients, note=_score(record))
        now = time.monotonic()
        if not self.console.is_terminal:
            task = self.progress.tasks[self.rounds if self.all is None else self.all]
            loss = record["train_loss"]
            facts = [
                *([_score(record)] if record["validation"] else []),
                *([f"training loss {loss:.4g}"] if loss is not None else []),
                f"{now - self._round_began:.1f} s",
            ]
            rounds = self.progress.tasks[self.rounds].total
            self.say(f"round {record['round'] + 1} of {rounds}: {', '.join(facts)}; {time_left(task)} left")
        self._round_began = now


def _score(record: Mapping[str, Any]) -> str:
    """The validation score of a round or cell in words."""
    metric = METRICS[record["metric"]]
    return f"validation {metric.title} {metric.format(record['validation'][metric.name])}"
