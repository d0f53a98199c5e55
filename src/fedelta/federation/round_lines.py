"""A file with one JSON line per round, which only the running process extends."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedelta.errors import Diverged, FedeltaError, quantity
from fedelta.federation.schema import check
from fedelta.files import named_errors, write_file
from fedelta.reading import parse_json

MAX_LINE_BYTES = 32_000_000
"""Limit for one line. A round of ten thousand clients has less than 2 MB."""


class DamagedFileWarning(UserWarning):
    """A file of a run is damaged, and reading can continue without the damaged part."""


class RoundLines:
    """The lines of one file.

    Args:
        path: the file.
        kind: the `TypedDict` of a line.
    """

    def __init__(self, path: Path, kind: type) -> None:
        self.path = path
        self.kind = kind
        self._sha = hashlib.sha256()
        self._known: tuple[int, int] | None = None

    @property
    def digest(self) -> str:
        """Digest of all lines that this process has written or kept."""
        return self._sha.hexdigest()

    def start(self, content: bytes = b"") -> None:
        """Replace the content of the file."""
        write_file(self.path, content)
        self.follow(content)

    def follow(self, content: bytes) -> None:
        """Remember the file's present content, so that a change by another program is noticed."""
        self._sha = hashlib.sha256(content)
        self._known = self.path.stat().st_ino, len(content)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line and flush it to disk.

        Raises:
            Diverged: if a number of the record is not finite.
            FedeltaError: if another program has removed, replaced or changed the file since the last line.
            OSError: naming the file.
        """
        try:
            line = (json.dumps(record, sort_keys=True, allow_nan=False) + "\n").encode()
        except ValueError as error:
            raise Diverged(
                f"round {record['round']}: a score is not finite because the model diverged; try a lower learning_rate"
            ) from error
        self.extend(line)

    def extend(self, lines: bytes) -> None:
        """Add finished lines and flush them to disk. Raises as `append`."""
        self.check_unchanged()
        with named_errors(self.path), self.path.open("r+b") as stream:
            stream.seek(0, os.SEEK_END)
            stream.write(lines)
            stream.flush()
            os.fsync(stream.fileno())
            stat = os.fstat(stream.fileno())
        self._sha.update(lines)
        # Some file systems, such as the layers of a container, give a file a new number at its first change.
        self._known = stat.st_ino, (self._known[1] if self._known else stat.st_size - len(lines)) + len(lines)

    def check_unchanged(self) -> None:
        """Raise if the file is not the one that this process has written.

        Raises:
            FedeltaError: naming the file.
        """
        try:
            stat = self.path.stat()
        except OSError as error:
            raise FedeltaError(f"{self.path} was removed while the run wrote it; the run has stopped") from error
        if self._known is not None and (stat.st_ino, stat.st_size) != self._known:
            raise FedeltaError(
                f"{self.path} was changed by another program while the run wrote it; the run has stopped, and --resume "
                "continues it"
            )

    def kept(self, count: int) -> tuple[bytes, str]:
        """Return the first `count` lines as bytes, and their digest.

        Raises:
            FedeltaError: if the file has fewer lines.
        """
        lines: list[bytes] = []
        for line in self._raw():
            if len(lines) == count:
                break
            lines.append(line)
        if len(lines) < count:
            raise FedeltaError(
                f"{self.path} has {quantity(len(lines), 'line')}, but the checkpoint has "
                f"{quantity(count, 'finished round')}"
            )
        content = b"".join(lines)
        return content, hashlib.sha256(content).hexdigest()

    def records(self) -> list[Any]:
        """Read all lines. An unfinished last line is left out with a warning.

        Raises:
            FedeltaError: naming the file and the line that is not a record.
        """
        found = []
        for number, line in enumerate(self._raw(), 1):
            name = f"{self.path}, line {number}"
            if not line.endswith(b"\n"):
                # A killed process, or one that is writing at this moment.
                warnings.warn(f"{name} is unfinished, and left out", DamagedFileWarning, stacklevel=2)
                break
            record = check(parse_json(line, name), self.kind, name)
            if record["round"] != number - 1:
                raise FedeltaError(f"{name}: round is {record['round']}, expected {number - 1}")
            found.append(record)
        return found

    def _raw(self) -> Iterator[bytes]:
        try:
            stream = self.path.open("rb")
        except FileNotFoundError:
            return
        with named_errors(self.path), stream:
            number = 0
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise FedeltaError(f"{self.path}, line {number} has more than {MAX_LINE_BYTES:,} bytes")
                yield line
