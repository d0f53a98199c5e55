"""The folder of a run, written after every round so that a run can be watched, killed and resumed.

config.yaml     the resolved configuration with every default written out
rounds.jsonl    one line per round: clients, losses, scores, bytes, deviation. Equal runs write equal bytes
timings.jsonl   one line per round: seconds by phase, which differ between equal runs
generations.jsonl  one line per answer that an evaluation has generated. Equal runs write equal bytes
checkpoint/     the server's state after the last finished round, and after the round before it
result.json     the scores of the final model
adapter/        the final model as a PEFT adapter
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml

from fedelta.errors import FedeltaError, quantity
from fedelta.federation.checkpoint import Checkpoint, History, load_newest, save_checkpoint
from fedelta.federation.folder_lock import HOLD_S, hold_folder
from fedelta.federation.generations import BEFORE, Generations
from fedelta.federation.lasting_settings import first_difference, lasting
from fedelta.federation.records import AcceptedChange, Inputs, Result, RoundRecord, Timing
from fedelta.federation.result_file import read_result, write_result
from fedelta.federation.round_lines import RoundLines
from fedelta.federation.run_paths import RunPaths
from fedelta.federation.schema import digest_of
from fedelta.federation.server import ServerState
from fedelta.files import write_file
from fedelta.learning.tasks import Answer
from fedelta.lora.adapter import Adapter
from fedelta.protocol.compression import ErrorFeedback
from fedelta.reading import read_yaml

Complete = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class RunFolder(RunPaths):
    """The folder of one run.

    Args:
        path: the folder; it need not exist.
        config: the run's configuration as plain data.
        complete: adds the defaults of keys that a configuration lacks because an earlier version wrote it.

    Attributes:
        inputs: what the run learns from; each checkpoint and the result include it.
        accepted: changes of the inputs that the run was told to accept.
        test_before: scores of the initial model on the test split. None if it is not evaluated.
        generations: the answers that evaluations have generated.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], complete: Complete = dict) -> None:
        super().__init__(path)
        self.config = dict(config)
        self._complete = complete
        self.inputs: Inputs = {}
        self.accepted: tuple[AcceptedChange, ...] = ()
        self.test_before: Mapping[str, float] | None = None
        self.generations = Generations(self.generations_file)
        self._rounds = RoundLines(self.rounds_file, RoundRecord)
        self._timings = RoundLines(self.timings_file, Timing)

    def hold(self, patience: float = HOLD_S) -> AbstractContextManager[None]:
        """Lock the folder against other processes, see `hold_folder`."""
        return hold_folder(self.path, patience)

    def begin(self, state: ServerState, answers: Sequence[Answer] = ()) -> None:
        """Start a new run in this folder.

        Args:
            state: the server's state before round 0.
            answers: answers of the initial model.

        Raises:
            FedeltaError: if the folder holds a run that has finished a round.
        """
        self.refuse_existing()
        self.checkpoint_file.parent.mkdir(parents=True, exist_ok=True)
        # Leftovers of a run that has not finished a round would be mistaken for parts of this one.
        for leftover in (self.checkpoint_file, self.previous_checkpoint_file, self.result_file):
            leftover.unlink(missing_ok=True)
        write_file(self.config_file, yaml.safe_dump(self.config, sort_keys=False))
        self._rounds.start()
        self._timings.start()
        self.generations.start()
        self.generations.add(answers, BEFORE, "test")
        save_checkpoint(self.checkpoint_file, state, self.config, {}, {}, self._history)

    def refuse_existing(self) -> None:
        """Raise if the folder holds a run that has finished a round.

        Raises:
            FedeltaError: if it does.
        """
        has_lines = self.rounds_file.exists() and self.rounds_file.stat().st_size > 0
        if has_lines or self.result_file.exists() or self.previous_checkpoint_file.exists():
            way_on = (
                "continue it with --resume" if self.checkpoint_file.exists() else "it has no checkpoint to resume from"
            )
            raise FedeltaError(f"{self.path} holds a run already; {way_on}, or choose another name=…")

    @property
    def _history(self) -> History:
        return History(self.inputs, self.accepted, self._rounds.digest, self.generations.digest, self.test_before)

    def saved(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """Load the newest checkpoint that can be used, see `load_newest`; None if no run has begun."""
        return load_newest(self.checkpoint_file, warn)

    def _check_lines(self, checkpoint: Checkpoint) -> None:
        """Raise unless each file begins with the lines that belong to the checkpoint."""
        history, count = checkpoint.history, checkpoint.state.round
        wanted = {self._rounds: history.rounds_digest, self.generations: history.generations_digest}
        for lines, digest in wanted.items():
            if digest not in (None, lines.kept(count)[1]):
                raise FedeltaError(
                    f"{lines.path} is not what the run wrote; restore it, or start again under another name"
                )

    def resume(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """Load the checkpoint to resume from. Nothing is changed before `rewind`.

        Args:
            warn: called with one line if the newest checkpoint is damaged, and the one before it is used.

        Returns:
            The checkpoint, or None if no run has begun in this folder.

        Raises:
            FedeltaError: if the checkpoints are damaged, belong to another configuration or have more rounds than the
                configuration asks for, or if `rounds.jsonl` is not the file that the run wrote.
        """
        checkpoint = load_newest(self.checkpoint_file, warn, self._check_lines)
        if checkpoint is None:
            return None
        self._check_config(checkpoint.config, f"checkpoint {self.checkpoint_file}")
        present, wanted = checkpoint.state.round, self.config["rounds"]
        if present > wanted:
            raise FedeltaError(f"{self.path} already has {quantity(present, 'round')}, but {wanted} were asked for")
        return checkpoint

    def _check_config(self, before: Mapping[str, Any], what: str) -> None:
        """Raise if a configuration that was written down is not the present one."""
        training = before.get("training")
        if self.config["training"]["stack"] == "auto" and isinstance(training, Mapping):
            self.settle_stack(training.get("stack", "auto"))
        changed = first_difference(self._complete(before), json.loads(json.dumps(self.config)))
        if changed:
            raise FedeltaError(f"{what} belongs to another configuration: {changed}")

    def finished_result(self, checkpoint: Checkpoint | None) -> Result | None:
        """Return the result if the run has finished all of its rounds, else None.

        Args:
            checkpoint: the run's checkpoint; None if its file is gone, which a finished run does not need.

        Raises:
            FedeltaError: if `result.json` or `config.yaml` is damaged or belongs to another configuration.
        """
        result = self.result()
        if result is None or result["rounds"] != self.config["rounds"]:
            return None
        if checkpoint is None:
            self._check_config(self._read_config(), str(self.config_file))
        return result if checkpoint is None or checkpoint.state.round == result["rounds"] else None

    def _read_config(self) -> dict[str, Any]:
        data = read_yaml(self.config_file)
        if not isinstance(data, dict):
            raise FedeltaError(f"{self.config_file} holds a {type(data).__name__}, expected keys and values")
        return data

    def rewind(self, checkpoint: Checkpoint) -> None:
        """Drop everything that was written after a checkpoint.

        Raises:
            FedeltaError: if `rounds.jsonl` or `timings.jsonl` has fewer lines than finished rounds.
        """
        count = checkpoint.state.round
        kept: list[tuple[RoundLines, bytes]]
        kept = [(lines, lines.kept(count)[0]) for lines in (self._rounds, self._timings, self.generations)]
        if count == self.config["rounds"] and self.result_file.exists():
            # A finished run also keeps the answers of its final model.
            kept[-1] = self.generations, self.generations.whole()[0]
        self.test_before = checkpoint.history.test_before
        for lines, content in kept:
            if lines.path.exists() and lines.path.stat().st_size == len(content):
                lines.follow(content)
            else:
                lines.start(content)
        write_file(self.config_file, yaml.safe_dump(self.config, sort_keys=False))
        if count < self.config["rounds"]:
            self.result_file.unlink(missing_ok=True)

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
        answers: Sequence[Answer] = (),
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
            answers: answers that were generated for the validation split.

        Raises:
            Diverged: if a score of the record is not finite.
        """
        if self.accepted and self.accepted[-1]["round"] == record["round"]:
            record = {**record, "changed_inputs": self.accepted[-1]["changes"]}
        self._rounds.append(record)
        self._timings.append(timing)
        self.generations.add(answers, record["round"], "validation")
        save_checkpoint(self.checkpoint_file, state, self.config, kept, error_feedback, self._history)

    def finish(self, result: Result) -> None:
        """Write `result.json`, with the inputs and with digests of itself and of the files that belong to it.

        Raises:
            FedeltaError: if another program has changed or removed the run's files.
        """
        self.check_unchanged()
        facts: dict[str, Any] = {
            "inputs": self.inputs,
            "accepted": list(self.accepted),
            "config_digest": digest_of(lasting(self.config)),
            "rounds_digest": self._rounds.digest,
        }
        if self.generations.has_lines:
            facts["generations_digest"] = self.generations.digest
        write_result(self.result_file, {**result, **facts})  # type: ignore[typeddict-item]

    def check_unchanged(self) -> None:
        """Raise a FedeltaError if another program has changed or removed the files that this process extends."""
        self._rounds.check_unchanged()
        self._timings.check_unchanged()
        self.generations.check_unchanged()

    def records(self) -> list[RoundRecord]:
        """Read the lines of `rounds.jsonl`, or raise a FedeltaError that names the line which is not a record."""
        return self._rounds.records()

    def timings(self) -> list[Timing]:
        """Read the lines of `timings.jsonl`, or raise a FedeltaError that names the line which is not a record."""
        return self._timings.records()

    def result(self) -> Result | None:
        """Read `result.json`; None if the run has not ended.

        Raises:
            FedeltaError: if the file is damaged.
        """
        return read_result(self.result_file)

    def check_finished(self, result: Result) -> list[RoundRecord]:
        """Check that the files of a finished run belong together, and return its records.

        Args:
            result: the content of `result.json`.

        Raises:
            FedeltaError: if one of the files was changed after the run.
        """
        records = self.records()
        if len(records) != result["rounds"]:
            lines, finished = quantity(len(records), "whole line"), quantity(result["rounds"], "round")
            raise FedeltaError(f"{self.rounds_file} has {lines}, but the run has finished {finished}")
        if result.get("rounds_digest", digest := self._rounds.kept(len(records))[1]) != digest:
            raise FedeltaError(f"{self.rounds_file} was changed after the run: its lines have another digest")
        if result.get("config_digest", digest := digest_of(lasting(self._read_config()))) != digest:
            raise FedeltaError(f"{self.config_file} was changed after the run; --resume writes it again")
        if result.get("generations_digest", digest := self.generations.whole()[1]) != digest:
            raise FedeltaError(f"{self.generations_file} was changed after the run: its lines have another digest")
        return records
