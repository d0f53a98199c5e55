"""Text from files, clients and libraries is printed without markup or control characters, and cut."""

import doctest
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedelta import errors
from fedelta.cli.app import main
from fedelta.cli.printing import print_error, print_path, print_text, print_warning
from fedelta.cli.progress import MessagePrinter, TerminalProgress
from fedelta.errors import CUT, listed, one_line
from fedelta.runs.report.text_table import TextTable

HOSTILE = "\x1b]0;title\x07\x1b[2J[red]x[/red] \u202eback\u200bwards\r\n:warning: second line"


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)


def printed(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_every_way_of_printing_escapes_and_keeps_one_line(terminal: Console) -> None:
    printer = MessagePrinter(terminal)
    for show in (printer.say, printer.warn):
        show(HOSTILE)
    for write in (print_text, print_error, print_warning):
        write(terminal, HOSTILE)
    print_path(terminal, "adapter", HOSTILE)
    lines = printed(terminal).splitlines()
    assert len(lines) == 6
    for line in lines:
        assert line.isprintable()
        assert "[red]x[/red]" in line
        assert ":warning: second line" in line


def test_lines_of_a_megabyte_lose_their_middle(terminal: Console) -> None:
    text = "start " + "x" * 10**6 + " end"
    print_error(terminal, text)
    MessagePrinter(terminal).say(text)
    for line, limit in zip(printed(terminal).splitlines(), (299, 1000), strict=True):
        assert "start" in line
        assert CUT in line
        assert line.endswith(" end")
        assert len(line) <= limit


def test_names_beside_the_bars_are_escaped_and_cut(terminal: Console) -> None:
    progress = TerminalProgress(terminal)
    progress.run_started(HOSTILE, 0, 3)
    progress.client_done(HOSTILE)
    progress.evaluation_started("y" * 10_000, 5)
    notes = [task.fields["note"] for task in progress.progress.tasks]
    assert all(note.isprintable() and len(note) <= 60 for note in notes)
    terminal.print(progress.progress.get_renderable())
    assert "[red]x[/red]" in printed(terminal)


def test_tables_escape_their_cells(terminal: Console) -> None:
    table = TextTable("t", HOSTILE, ["name", "score | unit"], [[HOSTILE, "1"], ["z" * 10_000, "2"]])
    terminal.print(table.console())
    assert "\x1b" not in printed(terminal)
    assert "[red]x[/red]" in printed(terminal)
    markdown = table.markdown()
    assert len(markdown.splitlines()) == 4
    assert "\x1b" not in markdown
    assert "score \\| unit" in markdown
    assert max(map(len, markdown.splitlines())) < 300


def test_an_error_of_the_command_line_is_one_short_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for argument in ("name=" + "\x1b[31m[bold]" + "y" * 5000, "z" * 5000 + "=1", "/no\n/such\x1b[2J"):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["fedelta", "run", argument])
        with pytest.raises(SystemExit) as code:
            main()
        error = capsys.readouterr().err
        assert code.value.code == 2
        assert len(error) < 300
        assert len(error.splitlines()) == 1
        assert error.strip().isprintable()
        assert not list(tmp_path.iterdir())


def test_the_examples_in_the_docstrings_run() -> None:
    result = doctest.testmod(errors)
    assert result.attempted > 0
    assert result.failed == 0


def test_text_of_any_kind_becomes_one_short_line() -> None:
    assert one_line("a\tb\x00c\n\n d") == "a b c d"
    assert one_line(ValueError("x" * 500)).startswith("xxx")
    assert len(one_line("é" * 10**7)) <= 220
    assert one_line("\ud800") == ""
    names: list[Any] = ["a\nb", "c" * 100, *range(98)]
    assert listed(names, 2) == f"a b, {'c' * 19}{CUT}{'c' * 18} and 98 more"
