"""A run never continues with rows, a tokenizer or a base model that are not its own without saying so."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import yaml

from command import fedelta, refusal
from fedelta.errors import FedeltaError
from fedelta.federation.engines import Observer
from fedelta.runs.config import Config, parse_config
from fedelta.runs.identity import identify, input_changes
from fedelta.runs.runner import run


@pytest.fixture
def own(tiny_config: Any, tiny_bert: Path, texts: Path, tmp_path: Path) -> Callable[..., Config]:
    """A function like `tiny_config`, with a model and rows that a test may change."""
    model = shutil.copytree(tiny_bert, tmp_path / "model")
    rows = tmp_path / "rows"
    rows.mkdir()
    lines = texts.read_text().splitlines(keepends=True)
    for name, part in {"train": lines[1:101], "validation": lines[101:121], "test": lines[121:181]}.items():
        (rows / f"{name}.csv").write_text(lines[0] + "".join(part))

    def make(**changes: Any) -> Config:
        data = {"source": str(rows), "max_length": 16}
        return parse_config(
            tiny_config(rounds=2).dump() | {"model": {"name": str(model)}, "data": data} | changes, "test"
        )

    return make


def grow(file: Path) -> None:
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines, *lines[1:21]]))


def change_weight(folder: Path) -> None:
    """Change one number, and keep the size and the date of the file."""
    file = folder / "model.safetensors"
    stat, tensors = file.stat(), safetensors.torch.load_file(file)
    tensors[sorted(tensors)[4]].view(-1)[3] += 1
    file.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    assert file.stat().st_size == stat.st_size
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_json(file: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def swap_words(tokenizer: dict[str, Any]) -> None:
    words = tokenizer["model"]["vocab"]
    words["ship"], words["wave"] = words["wave"], words["ship"]


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "test rows": (lambda place: grow(place / "rows/test.csv"), "test rows changed: 80 rows, were 60"),
    "training rows": (lambda place: grow(place / "rows/train.csv"), "training rows changed: 120 rows, were 100"),
    "one weight": (lambda place: change_weight(place / "model"), "base weights changed"),
    "dropout": (
        lambda place: change_json(place / "model/config.json", lambda c: c.update(hidden_dropout_prob=0.5)),
        "base configuration changed",
    ),
    "tokenizer": (lambda place: change_json(place / "model/tokenizer.json", swap_words), "tokenizer changed"),
    "template": (
        lambda place: change_json(place / "model/tokenizer_config.json", lambda c: c.update(chat_template="{{ x }}")),
        "chat template changed",
    ),
}


@pytest.fixture
def file(own: Callable[..., Config], tmp_path: Path) -> Path:
    """The configuration file of a run that has finished two rounds."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(own().dump()))
    run(own())
    return path


def test_changed_inputs_are_refused_with_what_changed_and_accepted_with_the_option(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "tiny"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, (change, expected) in CHANGES.items():
        copies = {path: path.read_bytes() for place in ("rows", "model") for path in (tmp_path / place).iterdir()}
        change(tmp_path)
        for more in ([], ["rounds=3"]):
            line = refusal(capsys, "run", str(file), "--resume", *more)
            assert f"{folder}: {expected}" in line, name
            assert line.endswith("or pass --accept-changed-data")
        for path, content in copies.items():
            path.write_bytes(content)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    grow(tmp_path / "rows/test.csv")
    assert fedelta("run", str(file), "--resume", "--accept-changed-data", "rounds=3") == 0
    change = ["test rows changed: 80 rows, were 60"]
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [line.get("changed_inputs") for line in lines] == [None, None, change]
    result = json.loads((folder / "result.json").read_text())
    assert result["accepted"] == [{"round": 2, "changes": change}]
    assert result["inputs"]["test rows"]["rows"] == 80
    assert fedelta("run", str(file), "--resume", "rounds=3") == 0


def test_a_kill_between_two_rounds_does_not_hide_a_change(own: Callable[..., Config], tmp_path: Path) -> None:
    class Stop(Observer):
        def round_done(self, record: Any) -> None:  # noqa: ARG002
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(own(), observer=Stop())
    change_weight(tmp_path / "model")
    with pytest.raises(FedeltaError, match="base weights changed; restore the former inputs, or pass --accept"):
        run(own(), resume=True)
    assert run(own(), resume=True, accept_changed_data=True).result["accepted"] == [
        {"round": 1, "changes": ["base weights changed"]}
    ]


def test_a_file_that_changes_within_one_process_is_read_again(own: Callable[..., Config], tmp_path: Path) -> None:
    before = identify(own())
    assert input_changes(before, identify(own())) == []
    train = tmp_path / "rows/train.csv"
    grow(train)
    assert "training rows changed: 120 rows, were 100" in input_changes(before, identify(own()))
    assert run(own()).result["inputs"]["training rows"]["rows"] == 120


def test_a_path_with_a_variable_is_read_again_when_the_variable_changes(
    own: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = own(data={"source": "${ROWS}", "max_length": 16})
    shutil.copytree(tmp_path / "rows", tmp_path / "other")
    grow(tmp_path / "other/test.csv")
    monkeypatch.setenv("ROWS", str(tmp_path / "rows"))
    before = identify(config)
    monkeypatch.setenv("ROWS", str(tmp_path / "other"))
    assert input_changes(before, identify(config)) == ["test rows changed: 80 rows, were 60"]


def test_a_finished_run_stays_readable_when_its_data_are_gone(own: Callable[..., Config], tmp_path: Path) -> None:
    first = run(own())
    shutil.rmtree(tmp_path / "rows")
    assert run(own(), resume=True).result == first.result


def test_the_digests_do_not_depend_on_where_the_files_lie(own: Callable[..., Config], tmp_path: Path) -> None:
    before = identify(own())
    (tmp_path / "rows").rename(tmp_path / "moved")
    (tmp_path / "model").rename(tmp_path / "moved-model")
    config = own(
        data={"source": str(tmp_path / "moved"), "max_length": 16}, model={"name": str(tmp_path / "moved-model")}
    )
    assert identify(config) == before


def test_a_folder_that_is_removed_in_mid_run_ends_the_run_with_one_line(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedelta.cli.progress import TerminalProgress

    folder = tmp_path / "runs" / "removed"
    done = TerminalProgress.round_done

    def remove(self: Any, record: Any) -> None:
        done(self, record)
        shutil.rmtree(folder)

    monkeypatch.setattr(TerminalProgress, "round_done", remove)
    assert fedelta("run", str(file), "name=removed") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"error: {folder}/rounds.jsonl was removed while the run wrote it; the run has stopped"
    assert not folder.exists()
