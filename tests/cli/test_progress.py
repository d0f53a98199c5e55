import contextlib
import io
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from typing import Any

import pytest
from rich.console import Console

from fedelta.cli.progress import MessagePrinter, TerminalProgress
from fedelta.runs.runner import run


def rendered(console: Console, progress: TerminalProgress) -> str:
    console.print(progress.progress.get_renderable())
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def test_a_terminal_shows_rounds_clients_and_the_time_left(terminal: Console, tiny_config: Any) -> None:
    progress = TerminalProgress(terminal, all_rounds=6)
    run(tiny_config(rounds=3), observer=progress)
    text = rendered(terminal, progress)
    assert "replication, seed 0" in text
    assert "3/6" in text
    assert "3/3" in text
    assert "4/4" in text
    assert "validation accuracy" in text
    assert text.count("left") == 4
    assert "-:--:--" not in text


def test_a_resumed_run_measures_its_pace_from_where_it_resumes(terminal: Console) -> None:
    progress = TerminalProgress(terminal)
    progress.run_started("x", done=30, rounds=31)
    text = rendered(terminal, progress)
    assert "30/31" in text
    assert "-:--:--" in text, "the pace is not known yet"


STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d "


def test_without_a_terminal_each_round_is_a_line_with_its_time(tiny_config: Any) -> None:
    console = Console(file=io.StringIO(), width=40)
    with TerminalProgress(console) as progress:
        run(tiny_config(rounds=2, evaluation={"every": 2}), observer=progress)
        progress.warn("client-001 [skipped]")
    first, one, two, last = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert re.fullmatch(rf"{STAMP}replication, seed 0: 2 rounds", first)
    assert re.fullmatch(rf"{STAMP}round 1 of 2: training loss [\d.]+, [\d.]+ s; 0:\d\d:\d\d left", one)
    score = r"validation accuracy [\d.]+ %, training loss [\d.]+, [\d.]+ s"
    assert re.fullmatch(rf"{STAMP}round 2 of 2: {score}; 0:00:00 left", two)
    assert re.fullmatch(rf"{STAMP}warning: client-001 \[skipped\]", last)


def test_a_log_of_a_deployment_has_times_on_a_terminal_too(terminal: Console) -> None:
    MessagePrinter(terminal, stamped=True).say("waiting")
    MessagePrinter(terminal).say("plain")
    stamped, plain = terminal.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert re.fullmatch(rf"{STAMP}waiting", stamped)
    assert plain == "plain"


@pytest.mark.parametrize("width", [40, 59, 60, 79, 80, 100, 120, 200])
def test_each_bar_is_one_line_at_every_width(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    progress = TerminalProgress(console, all_rounds=10_000)
    progress.run_started("a-method-with-a-long-name, seed 12345", done=0, rounds=1000)
    progress.clients_started(0, 10_000)
    progress.client_done("a-client [bold]with\x1b[31m a long\nname" * 5)
    progress.evaluation_started("validation", 10_000)
    progress.progress.update(progress.rounds, completed=1)
    lines = rendered(console, progress).splitlines()
    assert len(lines) == 4
    assert all(len(line) <= width and "\x1b" not in line for line in lines)
    assert [line.split()[0] for line in lines] == ["all", "rounds", "clients", "evaluation"]
    assert "/1000 " in lines[1]
    assert "left" in lines[1]


ON_A_TERMINAL = """
import sys
from rich.console import Console
from fedelta.cli.bars import Bars
with Bars(Console(file=sys.stdout)) as bars:
    for name in ("rounds", "evaluation"):
        bars.update(bars.add_task(name, total=1000, note="a note that is long " * 9, before=0), completed=500)
    bars.refresh()
"""


@pytest.mark.parametrize("width", [40, 80])
def test_bars_on_a_real_terminal_do_not_wrap(width: int) -> None:
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, width))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    child = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**environment, "TERM": "xterm"},
    )
    assert child.wait(60) == 0
    os.close(follower)
    text = os.read(leader, 100_000).decode()
    os.close(leader)
    lines = [line.strip("\r") for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", text).split("\n")]
    assert sum("500/1000" in line for line in lines) >= 2
    assert max(map(len, lines)) <= width


def test_ctrl_c_ends_the_run_even_if_a_library_swallows_it() -> None:
    before = signal.getsignal(signal.SIGINT)
    with TerminalProgress(Console(file=io.StringIO())) as progress:
        progress.client_done("a")
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        with pytest.raises(KeyboardInterrupt):
            progress.client_done("b")
        with pytest.raises(KeyboardInterrupt):
            progress.evaluation_advanced(1)
    assert signal.getsignal(signal.SIGINT) is before
