"""Atomic writes that name their file, and bounded reading of JSON and YAML."""

import errno
import resource
from pathlib import Path
from typing import Any

import pytest

from fedelta.errors import FedeltaError
from fedelta.files import new_folder, write_file
from fedelta.reading import parse_json, parse_yaml, read_bytes, read_yaml

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 30))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("{a: " * 60, "expected"),
        ("- " * 60 + "a", "nested too deeply"),
        (LAUGHS, "more than 1,000,000 values with aliases written out"),
        (MERGES, "more than 1,000,000 values with aliases written out"),
        ("a: &a [*a]", "a value that contains itself"),
        ("a:\n\tb: 1", r"'\t' that cannot start any token at line 2, column 1"),
        ("a: [1", "line 1, column 6"),
        ("a: " + "1" * 5000, "4300 digits"),
        ("a: 2026-13-45", "month must be in 1..12"),
        ("? [a]\n: b", "unhashable key"),
        (b"\xff\xfea", "not a text file in UTF-8"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: 'x\x00'", "unacceptable character"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_yaml_that_is_too_deep_too_large_or_broken_is_one_line(text: Any, reason: str) -> None:
    with pytest.raises(FedeltaError) as raised:
        parse_yaml(text, "grid.yaml")
    line = str(raised.value)
    assert line.startswith("grid.yaml: ")
    assert reason in line
    assert len(line) < 300
    assert "\n" not in line


def test_aliases_and_merge_keys_of_ordinary_size_are_read() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: {<<: *x, d: 2}\ne: *x", "x") == {
        "a": {"b": 1},
        "c": {"b": 1, "d": 2},
        "e": {"b": 1},
    }
    assert parse_yaml("", "x") is None
    assert parse_yaml(b"\xef\xbb\xbfa: 1", "x") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": NaN}', "it holds NaN"),
        ('{"a": 1}\n{', "extra data at line 2, column 1"),
        ("1" * 5000, "4300 digits"),
        (b'{"a": "\xe4"}', "not UTF-8 at byte 7"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_json_that_is_too_deep_or_broken_is_one_line(text: Any, reason: str) -> None:
    with pytest.raises(FedeltaError, match=f"^x.json is not valid JSON: .*{reason}"):
        parse_json(text, "x.json")


def test_a_file_that_is_too_large_or_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1" * 100)
    with pytest.raises(FedeltaError, match="a.yaml has more than 10 bytes"):
        read_bytes(tmp_path / "a.yaml", 10)
    with pytest.raises(FedeltaError, match="grid .*/b.yaml: No such file"):
        read_yaml(tmp_path / "b.yaml", "grid")


def test_a_write_that_does_not_fit_names_the_file_and_leaves_the_old_content(tmp_path: Path) -> None:
    file = tmp_path / "state"
    write_file(file, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            write_file(file, bytes(5000))
        with pytest.raises(OSError, match="File too large") as inside, new_folder(tmp_path / "adapter") as folder:
            (folder / "x").write_bytes(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(file))
    assert inside.value.filename == str(tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert file.read_bytes() == b"old"


def test_the_content_before_is_kept_under_another_name(tmp_path: Path) -> None:
    file, previous = tmp_path / "state", tmp_path / "previous"
    for content in (b"1", b"2", b"3"):
        write_file(file, content, previous=previous)
    assert (file.read_bytes(), previous.read_bytes()) == (b"3", b"2")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_was_removed_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        write_file(tmp_path / "gone" / "state", b"1", make_folder=False)
    assert raised.value.filename == str(tmp_path / "gone" / "state")
    assert not (tmp_path / "gone").exists()
