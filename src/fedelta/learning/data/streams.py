"""Text files, compressed or not: their encoding, and their lines, each of a bounded length."""

import bz2
import codecs
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from fedelta.errors import FedeltaError
from fedelta.learning.data.table import say, shorten

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".xlsx": "xlsx",
}
"""Ending → format."""

COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MAX_LINE = 16 * 2**20
"""Longest line or cell, in characters."""

BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
WESTERN = frozenset(
    "ÄÖÜäöüßÀÁÅÆÇÈÉÊËÍÎÏÑÓÔÕØŒÚÛÝàáâãåæçèéêëíìîïñóòôõøœúùûýÿŠšŽž€„“”‘’‚–—…«»‹›°§·²³µ×©®™¡¿ºª½¼¾±£¢´\xa0•†"
)
"""Signs that a text of Western Europe has. Ã and Â are left out: they are what damaged UTF-8 looks like."""

DAMAGED = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError)


def format_of(path: Path) -> str | None:
    """Format of a file by its name, without regard to case or compression; None if it is not a data file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        return FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
    if suffixes and suffixes[-1] == ".zip":
        return FORMATS.get(suffixes[-2], "zip") if len(suffixes) > 1 else "zip"
    return FORMATS.get(suffixes[-1]) if suffixes else None


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file for reading bytes, decompressed.

    Raises:
        FedeltaError: if the compressed file is damaged, or an archive does not hold exactly one file.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".zip":
            with zipfile.ZipFile(path) as archive, archive.open(zip_member(path, archive)) as stream:
                yield stream
        else:
            with COMPRESSED.get(suffix, open)(path, "rb") as stream:
                yield stream
    except DAMAGED as error:
        raise FedeltaError(
            f"data file {named(path)}: the compressed file is damaged ({type(error).__name__})"
        ) from error
    except OSError as error:
        if error.errno is None:
            raise FedeltaError(f"data file {named(path)}: the compressed file is damaged") from error
        raise FedeltaError(f"data file {named(path)}: {error.strerror}") from error
    except RuntimeError as error:
        if "encrypted" not in str(error):
            raise
        raise FedeltaError(f"data file {named(path)}: the archive is encrypted") from error


def zip_member(path: Path, archive: zipfile.ZipFile) -> str:
    """Name of the only file in an archive."""
    names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX/")]
    if len(names) != 1:
        raise FedeltaError(f"data file {named(path)}: the archive holds {len(names)} files, expected one")
    return names[0]


def zip_format(path: Path) -> str | None:
    """Format of the only file in an archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return format_of(Path(zip_member(path, archive)))
    except zipfile.BadZipFile as error:
        raise FedeltaError(f"data file {named(path)}: the compressed file is damaged") from error


@contextmanager
def text_of(path: Path, encoding: str | None) -> Iterator[TextIOWrapper]:
    """Open a file as text. Line breaks stay as they are.

    Args:
        encoding: None detects it. A guess is shown.

    Raises:
        FedeltaError: if the bytes are not text in this encoding.
    """
    chosen = encoding or _encoding(path)
    if codecs.lookup(chosen).name == "utf-8":
        # A byte order mark is not part of the text.
        chosen = "utf-8-sig"
    with opened(path) as stream, TextIOWrapper(stream, chosen, newline="") as text:
        try:
            yield text
        except UnicodeError as error:
            raise FedeltaError(
                f"data file {named(path)}: not text in the encoding {chosen}; set data.encoding"
            ) from error


def lines_of(path: Path, text: TextIOWrapper) -> Iterator[str]:
    """Yield the lines of a text with their line breaks.

    Raises:
        FedeltaError: if a line is too long, or holds a NUL character as binary files do.
    """
    for number, line in enumerate(iter(lambda: text.readline(MAX_LINE), ""), 1):
        if len(line) >= MAX_LINE:
            raise FedeltaError(f"data file {named(path)}, line {number}: longer than {MAX_LINE} characters")
        if "\0" in line:
            raise FedeltaError(
                f"data file {named(path)}, line {number}: a NUL character, which texts do not have; "
                "if the file is UTF-16, set data.encoding: utf-16-le"
            )
        yield line


def named(path: Path) -> str:
    """A path for a message: its end, if it is long."""
    return shorten(path, 100, end=True)


def _encoding(path: Path) -> str:
    """UTF-8, what the byte order mark says, or cp1252 for a text that looks like it."""
    with opened(path) as stream:
        chunk = stream.read(2**20)
        for mark, encoding in BYTE_ORDER_MARKS.items():
            if chunk.startswith(mark):
                return encoding
        rest, number = b"", 1
        while chunk:
            data = rest + chunk
            try:
                data.decode()
                rest = b""
            except UnicodeDecodeError as error:
                # A chunk may end inside a character.
                if error.reason != "unexpected end of data" or len(data) - error.start > 3:
                    return _western(path, data, number + data[: error.start].count(b"\n"))
                rest, data = data[error.start :], data[: error.start]
            number += data.count(b"\n")
            chunk = stream.read(2**20)
    if rest:
        return _western(path, rest, number)
    return "utf-8"


def _western(path: Path, data: bytes, line: int) -> str:
    """Return cp1252 if these bytes look like it.

    Raises:
        FedeltaError: if they do not.
    """
    refusal = FedeltaError(
        f"data file {named(path)}, line {line}: not UTF-8; "
        "set data.encoding, such as cp1252, cp1251, shift_jis or gb18030"
    )
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        raise refusal from None
    signs = [c for c in text if ord(c) > 127]
    letters = sum(c.isalpha() for c in text)
    foreign = sum(c.isalpha() for c in signs)
    if sum(c in WESTERN for c in signs) < 0.95 * len(signs) or foreign > 0.3 * max(letters, 4):
        raise refusal
    word = next(word for word in text.split() if any(ord(c) > 127 for c in word))
    say(
        f"{named(path)} is not UTF-8 and was read as cp1252 (line {line}: {shorten(word, 40)!r}); "
        "set data.encoding if wrong"
    )
    return "cp1252"
