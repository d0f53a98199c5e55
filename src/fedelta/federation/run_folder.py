"""The folder of a run, written after every round so that a run can be watched, killed and resumed.

config.yaml     the resolved configuration with every default written out
rounds.jsonl    one line per round: clients, losses, scores, bytes, deviation. Equal runs write equal bytes
timings.jsonl   one line per round: seconds by phase, which differ between equal runs
checkpoint/     the server's state after the last finished round
result.json     the scores of the final model
adapter/        the final model as a PEFT adapter
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from fedelta.errors import Diverged, FedeltaError, quantity
from fedelta.federation.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedelta.federation.records import Result, RoundRecord
from fedelta.federation.server import ServerState
from fedelta.files import write_file
from fedelta.lora.adapter import Adapter
from fedelta.protocol.compression import ErrorFeedback

HOLD_S = 10.0
"""Seconds that `RunFolder.hold` waits for another process to end."""

EXTENDABLE = (
    *("rounds", "compare", "output", "name", "evaluation.target", "workers"),
    *("federation.attempts", "federation.deadline"),
)
"""Configuration keys that may change between a checkpoint and its resumption. A run can be moved, reported
differently, distributed over another number of workers, and given longer deadlines, more attempts or more rounds.
With more rounds, the former last round keeps its evaluation even if `evaluation.every` does not ask for it."""


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; it need not exist.
        config: the run's configuration as plain data.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        self.config = dict(config)

    @property
    def rounds_file(self) -> Path:
        return self.path / "rounds.jsonl"

    @property
    def timings_file(self) -> Path:
        return self.path / "timings.jsonl"

    @property
    def checkpoint_file(self) -> Path:
        return self.path / "checkpoint" / "state.safetensors"

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
    def clients_folder(self) -> Path:
        """Folder with what each client keeps between rounds, if clients run in processes of their own."""
        return self.path / "clients"

    @property
    def adapter_folder(self) -> Path:
        return self.path / "adapter"

    @contextmanager
    def hold(self, patience: float = HOLD_S) -> Iterator[None]:
        """Lock the folder against other processes while the context is open. A killed process releases its lock.

        Args:
            patience: seconds to wait for another process that is about to end.

        Raises:
            FedeltaError: if another process holds the lock.
        """
        new = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=patience)
        except Timeout as error:
            raise FedeltaError(f"{self.path}: another process is writing to this run") from error
        try:
            yield
        finally:
            with suppress(OSError):
                # Processes that wait for the lock notice that the file is gone. On systems that can't remove an open
                # file, it stays.
                Path(lock.lock_file).unlink()
            lock.release()
            with suppress(OSError):
                # A run that wrote nothing leaves no folder. rmdir fails on a folder that is not empty.
                for folder in new:
                    folder.rmdir()

    def begin(self, state: ServerState) -> None:
        """Start a new run in this folder.

        Args:
            state: the server's state before round 0.

        Raises:
            FedeltaError: if the folder holds a run that has finished a round.
        """
        self.refuse_existing()
        self.path.mkdir(parents=True, exist_ok=True)
        write_file(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
        write_file(self.rounds_file, "")
        write_file(self.timings_file, "")
        save_checkpoint(self.checkpoint_file, state, self.config, {}, {})

    def refuse_existing(self) -> None:
        """Raise if the folder holds a run that has finished a round.

        Raises:
            FedeltaError: if it does.
        """
        if self.rounds_file.exists() and self.rounds_file.stat().st_size > 0:
            raise FedeltaError(f"{self.path} holds a run already; continue it with --resume, or choose another name=…")

    def resume(self) -> Checkpoint | None:
        """Load the checkpoint to resume from, and drop the lines of rounds after it.

        Returns:
            The checkpoint, or None if no run has begun in this folder.

        Raises:
            FedeltaError: if the checkpoint is damaged, belongs to another configuration or has more rounds than the
                configuration asks for, or if `rounds.jsonl` or `timings.jsonl` has fewer lines than finished rounds.
        """
        if not self.checkpoint_file.exists():
            return None
        checkpoint = load_checkpoint(self.checkpoint_file)
        state, before = checkpoint.state, checkpoint.config
        if self.config["training"]["stack"] == "auto":
            self.settle_stack(before.get("training", {}).get("stack", "auto"))
        changed = _first_difference(before, json.loads(json.dumps(self.config)))
        if changed:
            raise FedeltaError(f"checkpoint {self.checkpoint_file} belongs to another configuration: {changed}")
        if before.get("rounds", 0) > self.config.get("rounds", 0) and state.round > self.config["rounds"]:
            present = quantity(state.round, "round")
            raise FedeltaError(
                f"{self.path} already has {present}, but the configuration asks for {self.config['rounds']}"
            )
        for file in (self.rounds_file, self.timings_file):
            text = file.read_text() if file.exists() else ""
            lines = text.splitlines(keepends=True)
            if len(lines) < state.round:
                lines_found, finished = quantity(len(lines), "line"), quantity(state.round, "finished round")
                raise FedeltaError(f"{file} has {lines_found}, but the checkpoint has {finished}")
            if len(lines) > state.round:
                write_file(file, "".join(lines[: state.round]))
        write_file(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
        if state.round < self.config["rounds"]:
            self.result_file.unlink(missing_ok=True)
        return checkpoint

    def settle_stack(self, stack: int) -> None:
        """Save the measured value of `training.stack: auto` in the run's configuration.

        The value must stay the same when the run resumes, because it changes results by rounding.
        """
        self.config["training"] = {**self.config["training"], "stack": stack}

    def finish_round(
        self,
        state: ServerState,
        kept: Mapping[str, Adapter],
        error_feedback: Mapping[str, ErrorFeedback],
        record: RoundRecord,
        timing: Mapping[str, Any],
    ) -> None:
        """Save a finished round.

        The checkpoint is written last. If the process ends before that, `resume` drops the lines of the round and the
        round runs again.

        Args:
            state: the server's state after the round.
            kept: see `Checkpoint`.
            error_feedback: see `Checkpoint`.
            record: the round's line of `rounds.jsonl`.
            timing: the round's line of `timings.jsonl`.

        Raises:
            Diverged: if a score of the record is not finite.
        """
        _append(self.rounds_file, record)
        _append(self.timings_file, timing)
        save_checkpoint(self.checkpoint_file, state, self.config, kept, error_feedback)

    def finish(self, result: Result) -> None:
        """Write `result.json`."""
        write_file(self.result_file, json.dumps(result, indent=2) + "\n")

    def records(self) -> list[RoundRecord]:
        """Read the lines of `rounds.jsonl`."""
        return [json.loads(line) for line in self.rounds_file.read_text().splitlines()]

    def result(self) -> Result | None:
        """Read `result.json`; None if the run has not ended.

        Raises:
            FedeltaError: if the file is damaged.
        """
        if not self.result_file.exists():
            return None
        try:
            values = json.loads(self.result_file.read_text())
            return Result(**{key: values[key] for key in Result.__annotations__})  # type: ignore[typeddict-item]
        except (ValueError, KeyError, TypeError) as error:
            raise FedeltaError(f"{self.result_file} is damaged ({error}); remove it and rerun with --resume") from error


def _append(file: Path, record: Mapping[str, Any]) -> None:
    try:
        line = json.dumps(record, sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise Diverged(
            f"round {record['round']}: a score is not finite because the model diverged; try a lower learning_rate"
        ) from error
    with file.open("a") as stream:
        stream.write(line + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _first_difference(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str | None:
    """Describe the first key in which two configurations differ, except for `EXTENDABLE`; None if there is none."""
    for key in sorted({*before, *now}):
        if prefix + key in EXTENDABLE:
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            inner = _first_difference(old, new, f"{prefix}{key}.")
            if inner:
                return inner
        elif old != new:
            return f"{prefix}{key} was {old!r}, now {new!r}"
    return None
