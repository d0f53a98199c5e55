"""Run the command line in the test process."""

import sys

import pytest

from fedelta.cli import app as cli


def fedelta(*arguments: str) -> int:
    """Run `fedelta` with these arguments and return its exit code."""
    before, sys.argv = sys.argv, ["fedelta", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail with exit code 2, and return its one line of error output."""
    assert fedelta(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.strip().splitlines()
    # Facts about the data may have been printed before.
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]
