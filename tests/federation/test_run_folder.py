"""The files of a run: damage is noticed and named, and what another program does to them ends the run."""

import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from fedelta.errors import FedeltaError
from fedelta.federation.checkpoint import FORMAT, WITHOUT_DIGESTS, load_checkpoint
from fedelta.federation.round_lines import MAX_LINE_BYTES, DamagedFileWarning
from fedelta.federation.run_folder import RunFolder
from fedelta.federation.server import ServerState
from fedelta.protocol.serialization import SEAL, adapter_tensors, pack, unpack_sealed
from tiny_server import make

CONFIG: dict[str, Any] = {"rounds": 3, "seed": 0, "training": {"stack": 1}, "name": "tiny"}
BYTES = {"adapter": 1, "heads": 0, "patch": 0, "overhead": 1, "total": 2}
RESULT: dict[str, Any] = {
    "method": "replication",
    "seed": 0,
    "rounds": 3,
    "classes": ["no", "yes"],
    "clients": {"a": 3},
    "constant_score": None,
    "validation": {"loss": 0.5},
    "test": {"loss": 0.25},
    "adapter_rank": 2,
    "lora_parameters": {"2": 18},
    "base_parameters": 100,
}


def record(number: int) -> Any:
    """A line of `rounds.jsonl`."""
    return {
        **{key: {} for key in ("skipped", "deviation", "scaled_deviation", "clients_validation", "late")},
        "round": number,
        "clients": ["a"],
        "promoted": [],
        "pruned": [],
        "ranks": {"2": 4},
        "train_loss": 0.5,
        "validation": {"loss": 0.5},
        "metric": "loss",
        "bytes_down": BYTES,
        "bytes_up": BYTES,
        "bytes_by_client": {"a": [2, 2]},
        "deviation_mean": None,
        "patch_width": 0,
        "energy_by_rank": [1.0, 0.5],
        "version": 0,
        "failed_attempts": [],
        "bytes_late": 0,
        "caught_up": {},
    }


def timing(number: int) -> Any:
    return {"round": number, "seconds": {"clients": 1.0}, "in_workers": {}, "counts": {"texts": 3}}


def after(state: ServerState, number: int) -> ServerState:
    """The state after some rounds."""
    return replace(state, method=replace(state.method, round=number))


def write_rounds(folder: RunFolder, first: int = 0, last: int = 3) -> None:
    _, state = make()
    for number in range(first, last):
        folder.finish_round(after(state, number + 1), {}, {}, record(number), timing(number))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """The folder of a finished run of three rounds."""
    made = RunFolder(tmp_path / "run", CONFIG)
    made.begin(make()[1])
    write_rounds(made)
    made.finish(RESULT)  # type: ignore[arg-type]
    return made


def reopened(folder: RunFolder) -> RunFolder:
    return RunFolder(folder.path, CONFIG)


def test_any_flipped_bit_of_a_checkpoint_is_noticed(folder: RunFolder) -> None:
    file = folder.checkpoint_file
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    places = [*range(72), *rng.sample(range(8 * header), 300), *rng.sample(range(8 * header, 8 * len(whole)), 200)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(FedeltaError, match=f"^checkpoint {file}: ") as raised:
            load_checkpoint(file)
        assert len(str(raised.value)) < 300


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: bytes(len(b)), lambda _: b"", lambda b: b[:-1] + b"!"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(
    damage: Callable[[bytes], bytes], folder: RunFolder
) -> None:
    expected = {file: file.read_bytes() for file in (folder.rounds_file, folder.timings_file, folder.checkpoint_file)}
    folder.checkpoint_file.write_bytes(damage(folder.checkpoint_file.read_bytes()))
    again, warnings = reopened(folder), []
    checkpoint = again.resume(warnings.append)
    assert checkpoint is not None
    assert checkpoint.state.round == 2
    assert len(warnings) == 1
    assert warnings[0].endswith("; continuing from the checkpoint before it, after 2 rounds")
    assert again.finished_result(checkpoint) is None
    again.rewind(checkpoint)
    assert not again.result_file.exists()
    assert [line["round"] for line in again.records()] == [0, 1]
    write_rounds(again, first=2)
    assert {file: file.read_bytes() for file in expected} == expected
    for file in folder.checkpoint_file.parent.iterdir():
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(FedeltaError, match=r"previous.safetensors, the one before it, can't be used either") as raised:
        reopened(folder).resume(warnings.append)
    assert len(str(raised.value)) < 300


def test_a_changed_line_of_a_finished_round_is_noticed(folder: RunFolder) -> None:
    lines = folder.rounds_file.read_bytes().splitlines(keepends=True)
    # The last line belongs to the newest checkpoint only, so the round runs again.
    folder.rounds_file.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"train_loss": 0.5', b'"train_loss": 0.4')]))
    with pytest.raises(FedeltaError, match="rounds.jsonl was changed after the run"):
        reopened(folder).check_finished(RESULT | {"rounds_digest": folder.result()["rounds_digest"]})  # type: ignore
    warnings: list[str] = []
    checkpoint = reopened(folder).resume(warnings.append)
    assert checkpoint is not None
    assert checkpoint.state.round == 2
    folder.rounds_file.write_bytes(b"".join([lines[0].replace(b"0.5", b"0.4"), *lines[1:]]))
    with pytest.raises(FedeltaError, match=r"rounds.jsonl is not what the run wrote; restore it, or start again"):
        reopened(folder).resume(warnings.append)


def test_a_checkpoint_of_the_version_without_digests_is_read(folder: RunFolder) -> None:
    tensors, facts = unpack_sealed(folder.checkpoint_file.read_bytes())
    assert facts.pop("format") == FORMAT
    history, _ = facts.pop("history"), facts.pop(SEAL)
    folder.checkpoint_file.write_bytes(pack(tensors, facts | {"format": WITHOUT_DIGESTS}))
    checkpoint = reopened(folder).resume(lambda _: None)
    assert checkpoint is not None
    assert checkpoint.history.inputs == {}
    folder.checkpoint_file.write_bytes(pack(tensors, facts | {"format": FORMAT, "history": history}))
    with pytest.raises(FedeltaError, match="it has no digest"):
        load_checkpoint(folder.checkpoint_file)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.complex64])
def test_a_tensor_of_another_dtype_is_one_line(dtype: torch.dtype, folder: RunFolder) -> None:
    tensors, facts = unpack_sealed(folder.checkpoint_file.read_bytes())
    changed = {name: tensor.to(dtype) if name.startswith("A/") else tensor for name, tensor in tensors.items()}
    file = folder.checkpoint_file
    facts = {key: value for key, value in facts.items() if key != SEAL} | {"format": WITHOUT_DIGESTS}
    file.write_bytes(save(changed, metadata={"fedelta": json.dumps(facts)}))
    with pytest.raises(FedeltaError, match=f"^checkpoint {file}: .*{dtype}, expected float32") as raised:
        load_checkpoint(file)
    assert len(str(raised.value)) < 300


LINES: dict[str, tuple[Callable[[list[bytes]], bytes], str]] = {
    "a list": (lambda lines: lines[0] + b"[1]\n" + lines[2], "line 2 holds a list, expected keys and values"),
    "a missing key": (lambda lines: lines[0] + b'{"round": 1}\n' + lines[2], "line 2: key 'clients' is missing"),
    "another type": (
        lambda lines: lines[0] + lines[1].replace(b'"patch_width": 0', b'"patch_width": "0"') + lines[2],
        "line 2: key 'patch_width' is not valid: input should be a whole number, found '0'",
    ),
    "a nested type": (
        lambda lines: lines[0].replace(b'"total": 2', b'"total": {}') + lines[1],
        "key 'bytes_down.total'",
    ),
    "NaN": (
        lambda lines: lines[0].replace(b'"train_loss": 0.5', b'"train_loss": NaN'),
        "line 1 is not valid JSON: it holds NaN",
    ),
    "infinity": (
        lambda lines: lines[0].replace(b'"train_loss": 0.5', b'"train_loss": 1e999'),
        "a finite number, found inf",
    ),
    "deep": (lambda lines: lines[0] + b"[" * 100_000 + b"\n", "line 2 is not valid JSON: nested too deeply"),
    "Latin-1": (lambda lines: lines[0].replace(b'"a"', b'"\xe4"'), "line 1 is not valid JSON: not UTF-8"),
    "an empty line": (lambda lines: lines[0] + b"\n" + lines[1], "line 2 is not valid JSON"),
    "another order": (lambda lines: lines[1] + lines[0], "line 1: round is 1, expected 0"),
    "zeros": (lambda lines: bytes(len(lines[0])) + b"\n", "line 1 is not valid JSON"),
    "a long line": (lambda _: b" " * (MAX_LINE_BYTES + 2), "line 1 has more than 32,000,000 bytes"),
}


@pytest.mark.parametrize("case", LINES)
def test_a_damaged_line_is_named(case: str, folder: RunFolder) -> None:
    damage, expected = LINES[case]
    folder.rounds_file.write_bytes(damage(folder.rounds_file.read_bytes().splitlines(keepends=True)))
    with pytest.raises(FedeltaError) as raised:
        reopened(folder).records()
    line = str(raised.value)
    assert line.startswith(str(folder.rounds_file))
    assert expected in line
    assert len(line) < 300


def test_a_line_that_is_still_being_written_is_left_out_with_a_word(folder: RunFolder) -> None:
    for file, read in ((folder.rounds_file, folder.records), (folder.timings_file, folder.timings)):
        with file.open("a") as stream:
            stream.write('{"round": 3, "cli')
        with pytest.warns(DamagedFileWarning, match=f"{file}, line 4 is unfinished, and left out"):
            assert len(read()) == 3


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", "[" * 100_000, '{"method": 1}', json.dumps(RESULT | {"digest": "0"}), "\x00"]
)
def test_a_damaged_result_is_one_line(content: str, folder: RunFolder) -> None:
    folder.result_file.write_text(content)
    with pytest.raises(FedeltaError, match=f"^{folder.result_file} is damaged .*; remove it and rerun with --resume$"):
        folder.result()


def test_a_result_of_an_older_version_is_read(folder: RunFolder) -> None:
    folder.result_file.write_text(json.dumps(RESULT))
    assert folder.result() == RESULT
    assert len(folder.check_finished(RESULT)) == 3  # type: ignore[arg-type]


def test_a_configuration_that_was_edited_after_the_run_is_refused(folder: RunFolder) -> None:
    result = folder.result()
    assert result is not None
    file = folder.config_file
    text = file.read_text()
    file.write_text(text.replace("name: tiny", "name: other"))  # the name does not change what was learned
    folder.check_finished(result)
    file.write_text(text.replace("seed: 0", "seed: 1"))
    with pytest.raises(FedeltaError, match="config.yaml was changed after the run; --resume writes it again"):
        folder.check_finished(result)


@pytest.mark.parametrize(
    ("trick", "reason"),
    [
        (lambda path: shutil.rmtree(path), "rounds.jsonl was removed while the run wrote it"),
        (lambda path: path.rename(path.with_name("moved")), "rounds.jsonl was removed while the run wrote it"),
        (lambda path: (path / "rounds.jsonl").unlink(), "rounds.jsonl was removed while the run wrote it"),
        (lambda path: (path / "rounds.jsonl").write_text(""), "rounds.jsonl was changed by another program"),
        (lambda path: (path / "timings.jsonl").unlink(), "timings.jsonl was removed while the run wrote it"),
        (lambda path: shutil.rmtree(path / "checkpoint"), "state.safetensors"),
        (
            lambda path: shutil.copytree(path.rename(path.with_name("moved")), path),
            "rounds.jsonl was changed by another program",
        ),
    ],
)
def test_files_that_are_removed_while_a_run_writes_them_end_the_run(
    trick: Callable[[Path], Any], reason: str, folder: RunFolder
) -> None:
    again = reopened(folder)
    again.config["rounds"] = 5
    checkpoint = again.resume(lambda _: None)
    assert checkpoint is not None
    again.rewind(checkpoint)
    trick(again.path)
    with pytest.raises((FedeltaError, OSError)) as raised:
        write_rounds(again, first=3, last=4)
    assert reason in str(raised.value)
    if "state" not in reason:
        with pytest.raises(FedeltaError, match="rounds.jsonl|timings.jsonl"):
            again.finish(RESULT)  # type: ignore[arg-type]


def test_a_full_disk_names_the_file(folder: RunFolder) -> None:
    again = reopened(folder)
    again.config["rounds"] = 5
    checkpoint = again.resume(lambda _: None)
    assert checkpoint is not None
    again.rewind(checkpoint)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (again.rounds_file.stat().st_size + 20, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            write_rounds(again, first=3, last=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.filename == str(again.rounds_file)
    # The half line is dropped, and nothing is lost.
    last = reopened(folder)
    last.config["rounds"] = 5
    checkpoint = last.resume(lambda _: None)
    assert checkpoint is not None
    last.rewind(checkpoint)
    assert len(last.records()) == 3


def test_leftovers_of_a_run_without_a_round_are_not_taken_for_a_new_one(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run", CONFIG)
    _, state = make()
    first.begin(after(state, 0))
    second = RunFolder(tmp_path / "run", CONFIG | {"seed": 1})
    second.begin(after(state, 0))
    assert [file.name for file in second.checkpoint_file.parent.iterdir()] == ["state.safetensors"]


def test_a_run_whose_log_was_deleted_is_not_overwritten(folder: RunFolder) -> None:
    folder.rounds_file.unlink()
    with pytest.raises(FedeltaError, match="holds a run already; continue it with --resume"):
        reopened(folder).begin(make()[1])
    shutil.rmtree(folder.checkpoint_file.parent)
    with pytest.raises(FedeltaError, match="holds a run already; it has no checkpoint to resume from"):
        reopened(folder).begin(make()[1])


def test_a_killed_write_between_the_two_generations_loses_neither(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends before the new file gets its name, with and without hard links."""
    _, state = make()
    newest = folder.checkpoint_file.read_bytes()
    for links in (True, False):
        with monkeypatch.context() as patched:
            if not links:
                patched.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
            original = Path.replace

            def crash(self: Path, target: Path, original: Any = original) -> Any:
                if target.name == "state.safetensors":
                    raise KeyboardInterrupt
                return original(self, target)

            patched.setattr(Path, "replace", crash)
            with pytest.raises(KeyboardInterrupt):
                write_rounds(folder, first=3, last=4)
        checkpoint = reopened(folder).saved(lambda _: None)
        assert checkpoint is not None
        assert checkpoint.state.round == 3
        folder.checkpoint_file.with_name("previous.safetensors").unlink()
        folder.checkpoint_file.write_bytes(newest)
        folder.rewind(checkpoint)
    assert set(adapter_tensors("", state.method.adapter)) <= set(unpack_sealed(newest)[0])
