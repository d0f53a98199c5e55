import contextlib
import io
import os
import signal
import time
from typing import Any

import pytest
from rich.console import Console

from fedelta.cli.progress import TerminalProgress
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


def test_without_a_terminal_only_warnings_appear(tiny_config: Any) -> None:
    console = Console(file=io.StringIO())
    with TerminalProgress(console) as progress:
        run(tiny_config(rounds=1), observer=progress)
        progress.warn("client-001 skipped")
    assert console.file.getvalue().strip() == "warning: client-001 skipped"  # type: ignore[attr-defined]


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
