"""Damaged run folders: resumed to the same bytes, reported, exported, or refused by the name of the file."""

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from encoder import build_bert, write_texts
from fedelta.files import write_file
from fedelta.runs.config import parse_config
from fedelta.runs.runner import run
from fuzzing import damage_to_folder, fuzz, outcome

RESULTS = ["rounds.jsonl", "result.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The configuration of a run of two rounds and its folder, and the results of the same run with three rounds."""
    home = tmp_path_factory.mktemp("finished")
    data = {
        "name": "run",
        "output": str(home / "runs"),
        "rounds": 2,
        "workers": 1,
        "method": "fedex",
        "model": {"name": str(build_bert(home))},
        "lora": {"alpha": 8},
        "ranks": {"allocation": "fixed", "low": 2, "high": 4, "share": 0.5},
        "data": {"source": str(write_texts(home / "texts.csv")), "max_length": 16, "limit": 40, "evaluation_limit": 20},
        "partition": {"clients": 3},
        "training": {"steps": 1, "batch_size": 4, "learning_rate": 0.01},
    }
    run(parse_config(data))
    straight = run(parse_config(data | {"name": "straight", "rounds": 3})).folder.path
    expected = {name: (straight / name).read_bytes() for name in RESULTS}
    return {"config": data, "folder": home / "runs" / "run", "expected": expected}


def files(folder: Path) -> list[str]:
    return sorted(
        str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file.name != ".lock"
    )


@contextmanager
def damaged_copy(finished: dict[str, Any], data: st.DataObject) -> Iterator[Path]:
    """Copy the run into a new folder and damage one of its files."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "runs" / "run"
        shutil.copytree(finished["folder"], folder)
        damage: Callable[[Path], str] = data.draw(damage_to_folder(files(finished["folder"])))
        damage(folder)
        yield folder


@fuzz(examples=25)
@given(data=st.data())
def test_a_damaged_run_is_reported_and_exported_or_refused(finished: dict[str, Any], data: st.DataObject) -> None:
    with damaged_copy(finished, data) as folder:
        exported = folder.parent.parent / "exported"
        if data.draw(st.booleans()):
            outcome("run folders", "report", str(folder))
        else:
            outcome("run folders", "export", str(folder), "--adapter", str(exported), output=exported)


@fuzz(examples=20)
@given(data=st.data())
def test_a_damaged_run_is_resumed_to_the_same_bytes_or_refused(finished: dict[str, Any], data: st.DataObject) -> None:
    with damaged_copy(finished, data) as folder:
        file = folder.parent.parent / "config.yaml"
        config = copy.deepcopy(finished["config"]) | {"output": str(folder.parent), "rounds": 3}
        write_file(file, yaml.safe_dump(config))
        if outcome("resumed runs", "run", str(file), "--resume") is None:
            for name in ("adapter/adapter_model.safetensors", "result.json"):
                assert (folder / name).read_bytes() == finished["expected"][name], name
