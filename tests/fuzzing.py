"""Random damage to files and values, and the one property that every command keeps.

A command ends with exit code 0, or with exit code 2 and one line of at most 300 characters. It stays within bounds of
time and memory, and a refusal leaves nothing half-written.

The tests in `tests/fuzz` try a few inputs each time. With `FEDELTA_FUZZ_MINUTES=60` the tests that run share this time,
and try new inputs until it is over.
"""

import contextlib
import functools
import io
import json
import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st

from command import fedelta

SECONDS = 60.0
"""Maximum time of one command on a tiny input. A loaded machine takes a tenth of it."""
EXTRA_BYTES = 3 * 2**30
"""Address space that one command may add to that of the test process."""
MAX_LINE = 300

tests = 1
"""Number of collected tests, which share `FEDELTA_FUZZ_MINUTES`."""
tried: Counter[str] = Counter()
"""`area: outcome` → number of inputs."""


def fuzz(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a `@given` test: try `examples` inputs, or new ones for a share of `FEDELTA_FUZZ_MINUTES`."""
    checks = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]
    options: dict[str, Any] = {"max_examples": examples, "deadline": None, "suppress_health_check": checks}
    minutes = float(os.environ.get("FEDELTA_FUZZ_MINUTES", 0))

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        if not minutes:
            return hypothesis.settings(**options)(test)
        found = hypothesis.settings(**options, derandomize=False, database=None)(test)

        @functools.wraps(found)
        def repeat(*args: Any, **kwargs: Any) -> None:
            until = time.monotonic() + 60 * minutes / tests
            while time.monotonic() < until:
                hypothesis.seed(random.SystemRandom().getrandbits(64))(found)(*args, **kwargs)

        return repeat

    return decorate


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fail if the block takes longer than `SECONDS`, or more memory than `EXTRA_BYTES`."""

    def expire(*_: Any) -> None:
        raise AssertionError(f"not finished within {SECONDS:.0f} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + EXTRA_BYTES, hard))
    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(area: str, *arguments: str, output: Path | None = None) -> str | None:
    """Run a command that may be refused.

    Args:
        area: what is fuzzed, for the counts at the end.
        arguments: the command's arguments.
        output: folder that a refusal must not leave, nor anything beside it.

    Returns:
        The line of the refusal; None if the command succeeded.
    """
    beside = set(output.parent.iterdir()) if output else set()
    errors = io.StringIO()
    with bounded(), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = fedelta(*arguments)
    lines = errors.getvalue().splitlines()
    tried[f"{area}: {'refused' if code else 'done'}"] += 1
    assert all(len(line) <= MAX_LINE for line in lines), lines
    if code == 0:
        return None
    assert code == 2, (code, lines)
    refusals = [line for line in lines if line.startswith("error: ")]
    assert len(refusals) == 1, lines
    assert lines[-1] == refusals[0], lines
    check_line(refusals[0])
    if output:
        left = sorted(str(path) for path in set(output.parent.iterdir()) ^ beside)
        assert not left, f"half-written: {left}"
    return refusals[0]


def check_line(text: str) -> None:
    """An error text is one printable line of at most `MAX_LINE` characters that says something."""
    assert len(text) <= MAX_LINE, text
    assert text.isprintable(), text
    assert text.strip()
    assert "Traceback" not in text


def refused(area: str, call: Callable[[], Any], kind: type[Exception]) -> Any:
    """Call a function that may raise an error of this kind, in one line; return its result, or the error."""
    with bounded():
        try:
            result = call()
        except kind as error:
            check_line(str(error))
            tried[f"{area}: refused"] += 1
            return error
    tried[f"{area}: done"] += 1
    return result


def numbers() -> st.SearchStrategy[Any]:
    """Numbers that overflow, vanish or are not numbers, and ordinary ones."""
    extreme = [0, -1, 1, 2, 10**6, 10**9, 2**31, 2**63, 10**30, -(2**63), 1e-300, 1e30, 1e300, -0.0, 0.5]
    return st.sampled_from([*extreme, float("inf"), float("-inf"), float("nan")])


def texts() -> st.SearchStrategy[str]:
    """Texts that a parser, a terminal, a path or a format string may take for something else."""
    hostile = [
        "",
        " ",
        "\n",
        "a\nb",
        "\x00",
        "\x1b[31mred",
        "[red]",
        "{text.__class__}",
        "{text:>1000000000}",
        "../../x",
    ]
    hostile += [
        "~",
        "${HOME}",
        "$(id)",
        "NA",
        "null",
        "true",
        "1e5",
        "007",
        "a" * 5000,
        "\u202eabc",
        "é",
        "(a+)+$",
        "*",
    ]
    return st.sampled_from(hostile) | st.text(max_size=20)


def values() -> st.SearchStrategy[Any]:
    """JSON values of every type, some of them deep or large."""
    deep = functools.reduce(lambda inner, _: [inner], range(200), 0)
    plain = st.none() | st.booleans() | numbers() | texts()
    nested = st.lists(plain, max_size=3) | st.dictionaries(texts(), plain, max_size=3)
    return plain | nested | st.just(deep)


def json_text(value: Any) -> str:
    """JSON with NaN and Infinity, as Python and some programs write it."""
    return json.dumps(value, allow_nan=True)


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Damage to a file's bytes: flipped bits, a cut, a foreign piece, other content."""
    kind = draw(st.sampled_from(["flip", "flip", "cut", "insert", "zero", "repeat", "other"]))
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    if kind == "flip":
        flipped = bytearray(content)
        for where in draw(st.lists(st.integers(0, max(len(content) - 1, 0)), min_size=1, max_size=4)):
            if content:
                flipped[where] ^= 1 << draw(st.integers(0, 7))
        return bytes(flipped)
    if kind == "cut":
        return content[:place]
    if kind == "insert":
        return content[:place] + draw(st.binary(min_size=1, max_size=40)) + content[place:]
    if kind == "zero":
        return content[:place] + bytes(min(64, len(content) - place)) + content[place + 64 :]
    if kind == "repeat":
        return content + content
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    hostile = [b"", b"[" * 100_000, b"{}", b"null", b"\xff\xfe\x00", pointer, b"PK\x03\x04", b"\x80\x04K\x01."]
    return draw(st.sampled_from(hostile) | st.binary(max_size=80))


@st.composite
def damaged_json(draw: st.DrawFn, content: bytes) -> bytes:
    """A JSON object with fields that are missing, added, or hold other values."""
    data = json.loads(content)
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.sampled_from([*data, "unknown"]))
        if key in data and draw(st.integers(0, 4)) == 0:
            del data[key]
        else:
            data[key] = draw(values())
    return json_text(data).encode()


@st.composite
def damage_to_folder(draw: st.DrawFn, files: list[str]) -> Callable[[Path], str]:
    """Draw damage to one file of a folder: a function that applies it and returns the name of the file."""
    name = draw(st.sampled_from(files))
    kind = draw(st.sampled_from(["bytes", "bytes", "bytes", "json", "json", "gone", "folder", "loop"]))
    data = draw(st.data())

    def apply(folder: Path) -> str:
        file = folder / name
        content = file.read_bytes()
        is_object = name.endswith(".json") and content.lstrip().startswith(b"{")
        if kind == "json" and is_object:
            file.write_bytes(data.draw(damaged_json(content)))
        elif kind in ("bytes", "json"):
            file.write_bytes(data.draw(damaged_bytes(content)))
        else:
            file.unlink()
            if kind == "folder":
                file.mkdir()
            elif kind == "loop":
                file.symlink_to(file)
        return name

    return apply
