"""Evaluation of runs by lm-evaluation-harness, on tasks from a local folder instead of a hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from causal import COLORS
from fedelta.errors import FedeltaError
from fedelta.learning.tasks.lm_harness import HarnessSettings, check_harness
from fedelta.runs.assemble import warm
from fedelta.runs.runner import run
from paths import ROOT

COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {kind}
doc_to_text: "the color of {{{{article}}}} {{{{thing}}}} is :"
"""
GENERATED = """
doc_to_target: "{{answer}} ."
generation_kwargs: {until: ["</s>"], max_gen_toks: 3, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = f"""
doc_to_choice: [{", ".join(COLORS.values())}]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_the_final_model_is_scored_by_generated_answers_and_by_multiple_choice(
    causal_config: Any, things: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, kind, rest in (("tints", "generate_until", GENERATED), ("choice", "multiple_choice", CHOSEN)):
        (folder / f"{name}.yaml").write_text(COMMON.format(name=name, rows=things, kind=kind) + rest)
    finished = run(
        causal_config(
            rounds=6,
            training={"epochs": 2, "batch_size": 8, "learning_rate": 0.02},
            evaluation={"harness": {"tasks": ["tints", "choice"], "include": str(folder), "limit": 40}},
        )
    )
    test = finished.result["test"]
    assert set(test) == {"loss", "perplexity", "tints/exact_match", "choice/acc"}
    assert test["tints/exact_match"] > 0.9
    assert test["choice/acc"] > 0.9
    assert test["loss"] < 0.5

    (folder / "broken.yaml").write_text(
        COMMON.format(name="broken", rows="nowhere.jsonl", kind="generate_until") + GENERATED
    )
    with pytest.raises(FedeltaError, match=r"evaluation\.harness: .*nowhere\.jsonl"):
        run(causal_config(name="y", rounds=1, evaluation={"harness": {"tasks": ["broken"], "include": str(folder)}}))
    with pytest.raises(FedeltaError, match="lm-evaluation-harness has no task 'shades'"):
        run(causal_config(name="x", evaluation={"harness": {"tasks": ["shades"], "include": str(folder)}}))


MATH = ROOT / "experiments" / "exact_aggregation" / "harness"


def test_the_math_task_reads_answers_as_metamath_writes_them(tmp_path: Path) -> None:
    """The task file of the experiments, on a local row instead of the hub's rows."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "tasks"
    shutil.copytree(MATH, folder, ignore=shutil.ignore_patterns("__pycache__"))
    rows = tmp_path / "math.jsonl"
    rows.write_text(json.dumps({"problem": "What is 2+4?", "solution": r"It is $\boxed{6}$."}) + "\n")
    file = folder / "metamath_math.yaml"
    path = "dataset_path: EleutherAI/hendrycks_math"
    assert path in file.read_text()
    local_path = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}"
    file.write_text(file.read_text().replace(path, local_path))
    check_harness(HarnessSettings(tasks=("metamath_math",), include=str(folder)))
    tasks = TaskManager(include_path=str(folder)).load(["metamath_math"])["tasks"]
    assert len(tasks) == 7
    task = tasks["metamath_math::algebra"]
    (row,) = task.test_docs()
    assert task.doc_to_text(row) == "Question: What is 2+4?\nAnswer:"
    for text, score in {
        "2+4 is $6$ and not $7$.\nThe answer is: 6": 1.0,
        r"Therefore, the answer is $\boxed{6}$.": 1.0,
        "6 seems near.\nThe answer is: 7": 0.0,
        "Six.": 0.0,
    }.items():
        assert task.process_results(row, [text]) == {"exact_match": score}


def test_a_task_that_the_harness_lacks_is_refused_before_a_grid(causal_config: Any) -> None:
    with pytest.raises(FedeltaError, match="lm-evaluation-harness has no task 'shades'"):
        warm(causal_config(evaluation={"harness": {"tasks": ["shades"]}}))


def test_the_harness_requires_a_language_model_and_its_package(
    tiny_config: Any, causal_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FedeltaError, match=r"evaluation.harness needs a language model, expected task: completion"):
        tiny_config(evaluation={"harness": {"tasks": ["gsm8k"]}})
    with pytest.raises(FedeltaError, match="method fedsa has no global model"):
        run(causal_config(method="fedsa", evaluation={"harness": {"tasks": ["gsm8k"]}}))
    monkeypatch.setattr("fedelta.learning.tasks.lm_harness.find_spec", lambda _: None)
    with pytest.raises(FedeltaError, match=r"evaluation.harness needs lm_eval: pip install 'fedelta\[harness\]'"):
        run(causal_config(evaluation={"harness": {"tasks": ["gsm8k"]}}))
