"""Signatures and first sentences of the standard library."""

from pathlib import Path

import pytest

from fedelta.errors import FedeltaError
from fedelta.learning.data.pydoc import MAX_SIGNATURE, MAX_SUMMARY, MIN_SUMMARY, read_functions


def test_rows_are_sentences_beside_signatures_and_none_comes_twice() -> None:
    rows = read_functions()
    assert rows == read_functions()
    assert len(rows) > 2500
    summaries = [row["summary"] for row in rows]
    assert len(set(summaries)) == len(summaries)
    assert all(MIN_SUMMARY <= len(text) <= MAX_SUMMARY + 1 and text.endswith(".") for text in summaries)
    assert all(row["signature"].startswith("def ") and len(row["signature"]) <= MAX_SIGNATURE for row in rows)
    found = {row["signature"]: row for row in rows}
    assert found["def getLogger(name=None)"] == {
        "signature": "def getLogger(name=None)",
        "summary": "Return a logger with the specified name, creating it if necessary.",
        "module": "logging",
        "chapter": "development tools",
    }


def test_only_first_sentences_of_functions_and_methods_are_rows(tmp_path: Path) -> None:
    (tmp_path / "shlex.py").write_text(
        '''
def one(a, *, b=1):
    """Split the text at e.g. its commas (v. 1.2).  Then stop."""
class Reader:
    """Read shell words from a file or a string."""
    def two(self) -> int:
        """Return the next word,
        or None.

        Details.
        """
    def three(self):
        """three(self) -> int: a signature is not a sentence."""
    def four(self):
        """Split the text at e.g. its commas (v. 1.2)."""
    def five(self):
        """Too short."""
'''
    )
    assert [(row["signature"], row["summary"]) for row in read_functions(tmp_path)] == [
        ("def one(a, *, b=1)", "Split the text at e.g. its commas (v. 1.2)."),
        ("def Reader.two(self)", "Return the next word, or None."),
    ]


def test_a_folder_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedeltaError, match="no sources of the standard library"):
        read_functions(tmp_path)
