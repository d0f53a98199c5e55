"""Counts of the inputs that the fuzzing tests have tried."""

from typing import Any

import pytest

import fuzzing


def pytest_collection_finish(session: pytest.Session) -> None:
    fuzzing.tests = sum("tests/fuzz/" in item.nodeid for item in session.items) or 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for area in sorted({key.partition(": ")[0] for key in fuzzing.tried}):
        done, refused = fuzzing.tried[f"{area}: done"], fuzzing.tried[f"{area}: refused"]
        terminalreporter.write_line(f"fuzzing {area}: {done + refused} inputs, {done} right and {refused} refused")
