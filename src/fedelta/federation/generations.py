"""The answers that evaluations generate, kept in `generations.jsonl`, one line each.

A line belongs to the initial model (`before`), to a round, or to the final model (`test`), in this order. A resumed run
keeps the lines of its finished rounds, as `RoundLines` does.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedelta.errors import FedeltaError
from fedelta.federation.records import GeneratedAnswer
from fedelta.federation.round_lines import RoundLines
from fedelta.federation.schema import check
from fedelta.learning.tasks import Answer
from fedelta.reading import parse_json

BEFORE, TEST = "before", "test"
"""Values of `round` for the initial model and for the final one."""


class Generations(RoundLines):
    """The file. It exists only if an evaluation has generated text.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, GeneratedAnswer)

    def start(self, content: bytes = b"") -> None:
        if content:
            super().start(content)
            return
        self.path.unlink(missing_ok=True)
        self._sha = hashlib.sha256()
        self._known = None

    def add(self, answers: Sequence[Answer], round: int | str, split: str) -> None:
        """Add the answers of one evaluation.

        Args:
            answers: generated answers.
            round: index of the round, `BEFORE` or `TEST`.
            split: the evaluated split.

        Raises:
            FedeltaError, OSError: as `RoundLines.append`.
        """
        if not answers:
            return
        if self._known is None:
            super().start()
        lines = [json.dumps(_record(answer, round, split), sort_keys=True) + "\n" for answer in answers]
        self.extend("".join(lines).encode())

    def check_unchanged(self) -> None:
        if self._known is not None:
            super().check_unchanged()

    @property
    def has_lines(self) -> bool:
        """Whether this process has written or kept lines."""
        return self._known is not None

    def kept(self, count: int) -> tuple[bytes, str]:
        """Return the lines of the initial model and of the first `count` rounds as bytes, and their digest."""
        lines = []
        for line, record in self._lines():
            if record["round"] == TEST or (isinstance(record["round"], int) and record["round"] >= count):
                break
            lines.append(line)
        content = b"".join(lines)
        return content, hashlib.sha256(content).hexdigest()

    def whole(self) -> tuple[bytes, str]:
        """Return all lines as bytes, and their digest."""
        content = b"".join(line for line, _ in self._lines())
        return content, hashlib.sha256(content).hexdigest()

    def records(self) -> list[GeneratedAnswer]:
        """Read all lines; none if no text was generated.

        Raises:
            FedeltaError: naming the line that is not a record.
        """
        return [record for _, record in self._lines()]

    def _lines(self) -> Iterator[tuple[bytes, GeneratedAnswer]]:
        for number, line in enumerate(self._raw(), 1):
            # A process that was killed, or that is writing at this moment, leaves an unfinished line.
            if not line.endswith(b"\n"):
                return
            name = f"{self.path}, line {number}"
            record = check(parse_json(line, name), GeneratedAnswer, name)
            if isinstance(record["round"], str) and record["round"] not in (BEFORE, TEST):
                raise FedeltaError(f"{name}: round is {record['round'][:20]!r}, expected a number, before or test")
            yield line, record


def _record(answer: Answer, round: int | str, split: str) -> dict[str, Any]:
    record: dict[str, Any] = {"round": round, "split": split, "row": answer.row}
    record |= {"prompt": answer.prompt, "answer": answer.text, "references": answer.references}
    if answer.client is not None:
        record["client"] = answer.client
    if answer.exact is not None:
        record["exact"] = answer.exact
    return record
