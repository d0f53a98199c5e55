"""A run's folder: what is written while it goes on, so that it can be watched, killed and resumed.

config.yaml     as resolved, every default written out
rounds.jsonl    a line a round: clients, losses, scores, bytes, deviation. Equal runs give equal bytes
timings.jsonl   a line a round: seconds by phase, which no two runs share
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
EXTENDABLE = (
    *("rounds", "compare", "output", "name", "evaluation.target", "workers"),
    *("federation.attempts", "federation.deadline"),
)
"""Keys in which a checkpoint's configuration may differ: a run may be moved, reported differently, shared out to other
workers, given more patience and more rounds (the former last round then keeps its evaluation, due or not)."""


class RunFolder:
    """The folder of one run.

    Args:
        path: its place.
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
        """What clients keep from one round to the next, where they are processes of their own."""
        return self.path / "clients"

    @property
    def adapter_folder(self) -> Path:
        return self.path / "adapter"

    @contextmanager
    def hold(self, patience: float = HOLD_S) -> Iterator[None]:
        """Let no other process write here; a process that is killed lets go.

        Args:
            patience: seconds to wait for one that is about to end.

        Raises:
            FedeltaError: if another process holds it.
        """
        new = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=patience)
        except Timeout as error:
            raise FedeltaError(f"{self.path}: another process is at work on this run") from error
        try:
            yield
        finally:
            with suppress(OSError):
                # Those who wait for it see that it is gone; where a file in use can't be removed it stays.
                Path(lock.lock_file).unlink()
            lock.release()
            with suppress(OSError):
                # Of a run of which nothing has come, nothing stays.
                for folder in new:
                    folder.rmdir()

    def begin(self, state: ServerState) -> None:
        """Start a new run here.

        Raises:
            FedeltaError: if there is one already that has finished a round.
        """
        self.refuse_existing()
        self.path.mkdir(parents=True, exist_ok=True)
        write_file(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
        write_file(self.rounds_file, "")
        write_file(self.timings_file, "")
        save_checkpoint(self.checkpoint_file, state, self.config, {}, {})

    def refuse_existing(self) -> None:
        if self.rounds_file.exists() and self.rounds_file.stat().st_size > 0:
            raise FedeltaError(f"{self.path} holds a run already; go on with it by --resume, or choose another name=…")

    def resume(self) -> Checkpoint | None:
        """The checkpoint to go on from, or None if no run has begun here. Forgets rounds after the checkpoint.

        Raises:
            FedeltaError: if the checkpoint is damaged or was made under another configuration.
        """
        if not self.checkpoint_file.exists():
            return None
        checkpoint = load_checkpoint(self.checkpoint_file)
        state, before = checkpoint.state, checkpoint.config
        if self.config["training"]["stack"] == "auto":
            self.settle_stack(before.get("training", {}).get("stack", "auto"))
        changed = _first_difference(before, json.loads(json.dumps(self.config)))
        if changed:
            raise FedeltaError(f"checkpoint {self.checkpoint_file} is of another configuration: {changed}")
        if before.get("rounds", 0) > self.config.get("rounds", 0) and state.round > self.config["rounds"]:
            done = quantity(state.round, "round")
            raise FedeltaError(f"{self.path} has {done} already, asked for {self.config['rounds']}")
        for file in (self.rounds_file, self.timings_file):
            found = file.read_text() if file.exists() else ""
            lines = found.splitlines(keepends=True)
            if len(lines) < state.round:
                present, finished = quantity(len(lines), "line"), quantity(state.round, "finished round")
                raise FedeltaError(f"{file} has {present}, but the checkpoint {finished}")
            if len(lines) > state.round:
                write_file(file, "".join(lines[: state.round]))
        write_file(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
        if state.round < self.config["rounds"]:
            self.result_file.unlink(missing_ok=True)
        return checkpoint

    def settle_stack(self, stack: int) -> None:
        """Keep with the run what was measured for `training.stack: auto`: the choice changes bits."""
        self.config["training"] = {**self.config["training"], "stack": stack}

    def finish_round(
        self,
        state: ServerState,
        kept: Mapping[str, Adapter],
        error_feedback: Mapping[str, ErrorFeedback],
        record: RoundRecord,
        timing: Mapping[str, Any],
    ) -> None:
        """Make a round last. The checkpoint comes last: lines without it are dropped and made again."""
        _append(self.rounds_file, record)
        _append(self.timings_file, timing)
        save_checkpoint(self.checkpoint_file, state, self.config, kept, error_feedback)

    def finish(self, result: Result) -> None:
        write_file(self.result_file, json.dumps(result, indent=2) + "\n")

    def records(self) -> list[RoundRecord]:
        """The lines of `rounds.jsonl`."""
        return [json.loads(line) for line in self.rounds_file.read_text().splitlines()]

    def result(self) -> Result | None:
        """`result.json`, or None while the run has not ended.

        Raises:
            FedeltaError: if the file is damaged.
        """
        if not self.result_file.exists():
            return None
        try:
            found = json.loads(self.result_file.read_text())
            return Result(**{key: found[key] for key in Result.__annotations__})  # type: ignore[typeddict-item]
        except (ValueError, KeyError, TypeError) as error:
            raise FedeltaError(f"{self.result_file} is damaged ({error}); remove it and go on by --resume") from error


def _append(file: Path, record: Mapping[str, Any]) -> None:
    try:
        line = json.dumps(record, sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise Diverged(
            f"round {record['round']}: a score is not finite; the model diverged, try a lower learning_rate"
        ) from error
    with file.open("a") as stream:
        stream.write(line + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _first_difference(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str | None:
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
