"""Fixtures: small models and data. They are built locally, and nothing is downloaded."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from architectures import build
from causal import TASK, build_model, write_rows
from encoder import build_bert, build_gpt2, write_texts
from fedelta.runs.config import Config, parse_config

# The tests do many small operations. Two threads on two shared cores can be fifty times slower than one thread.
torch.set_num_threads(1)
settings.register_profile("fedelta", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("fedelta")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT with a pooler."""
    return build_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def calm_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT with a pooler and without dropout."""
    folder = tmp_path_factory.mktemp("calm-bert")
    shutil.copytree(tiny_bert, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer GPT-2 with Conv1D layers."""
    return build_gpt2(tmp_path_factory.mktemp("tiny-gpt2"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 240 short texts about three topics, from several authors."""
    return write_texts(tmp_path_factory.mktemp("data") / "texts.csv")


@pytest.fixture
def tiny_config(tiny_bert: Path, texts: Path, tmp_path: Path) -> Any:
    """A function that makes a configuration. It trains in a second or two; keyword arguments replace whole sections."""

    def make(**changes: Any) -> Config:
        data = {
            "name": "tiny",
            "output": str(tmp_path / "runs"),
            "rounds": 3,
            "workers": 1,
            "method": "replication",
            "model": {"name": str(tiny_bert)},
            "lora": {"alpha": 8},
            "ranks": {"allocation": "fixed", "low": 2, "high": 4, "share": 0.5},
            "data": {"source": str(texts), "max_length": 16},
            # Shards are unequal: there are seven authors, and one of the four clients has only one author.
            "partition": {"kind": "natural", "by": "author", "clients": 4},
            "training": {"steps": 2, "batch_size": 8, "learning_rate": 0.01},
        }
        return parse_config(data | changes)

    return make


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: architecture → folder of a small causal language model, built on its first call."""
    return functools.cache(lambda name: build_model(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of prompts and completions."""
    return write_rows(tmp_path_factory.mktemp("things") / "things.jsonl")


@pytest.fixture
def causal_config(causal: Any, things: Path, tmp_path: Path) -> Any:
    """A function like `tiny_config` for a causal language model."""

    def make(architecture: str = "llama", **changes: Any) -> Config:
        data = {
            "name": "causal",
            "output": str(tmp_path / "runs"),
            "rounds": 2,
            "workers": 1,
            "method": "fedex",
            "task": TASK,
            "model": {"name": str(causal(architecture))},
            "lora": {"alpha": 8, "target_modules": "all-linear"},
            "ranks": {"allocation": "fixed", "low": 2, "high": 4, "share": 0.5},
            "data": {"source": str(things), "max_length": 32},
            "partition": {"clients": 4},
            "training": {"batch_size": 8, "learning_rate": 0.02},
        }
        return parse_config(data | changes)

    return make


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: name in `architectures.py` → folder of a small model, built on its first call."""
    return functools.cache(lambda name: build(name, tmp_path_factory.mktemp(name)))


@pytest.fixture
def copy_of(architecture: Any, tmp_path: Path) -> Any:
    """A function that copies a small model to a folder of the test and changes JSON files: `config={...}`."""

    def copy(name: str, folder: str = "model", **changes: dict[str, Any]) -> Path:
        target = tmp_path / folder
        shutil.copytree(architecture(name), target)
        for file, fields in changes.items():
            path = target / f"{file}.json"
            content = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(content | fields))
        return target

    return copy
