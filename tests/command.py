"""The command line, run in this process."""

import sys

import pytest

from fedelta.cli import app as cli


def fedelta(*arguments: str) -> int:
    """Run the command line in this process and return its exit code."""
    before, sys.argv = sys.argv, ["fedelta", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake prints."""
    assert fedelta(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]
