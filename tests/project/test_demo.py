"""The built-in example with its real model and texts. These tests are slow; `make test-slow` runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedelta.learning.data.sources import load_splits
from fedelta.learning.model.base_model import locate_model
from fedelta.methods import methods
from fedelta.runs.config import load_config
from fedelta.runs.runner import run
from paths import ROOT

SCRIPT = ROOT / "examples" / "score_with_peft.py"


@pytest.mark.slow
# These methods differ in the messages that they send and in the parts that an export combines.
@pytest.mark.parametrize("name", ["replication", "fedex", "ffa", "flora", "fed-sb"])
def test_plain_peft_reproduces_the_accuracy_of_the_demo(name: str, tmp_path: Path) -> None:
    ranks = [] if methods()[name].mixed_ranks else ["ranks.allocation=uniform"]
    small = ["rounds=3", "evaluation.every=3", "data.evaluation_limit=200", "threads=1"]
    config = load_config(None, [f"method={name}", f"output={tmp_path}", *ranks, *small])
    finished = run(config)
    classes = finished.result["classes"]
    split = load_splits(config.data, config.task.columns(config.data))["test"]
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for text, label in zip(split["text"][:], split["label"][:], strict=True):
            file.write(json.dumps({"text": text, "label": classes.index(label)}) + "\n")
    adapter = str(finished.folder.adapter_folder)
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            locate_model("minilm"),
            str(rows),
            "--classes",
            "8",
            "--adapter",
            adapter,
            "--max-length",
            str(config.data.max_length),
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.stdout == f"accuracy {finished.result['test']['accuracy']:.6f} on 200 texts\n"
    assert finished.result["test"]["accuracy"] > finished.result["constant_score"] + 0.03
