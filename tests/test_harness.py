"""A run judged by lm-evaluation-harness, on tasks of a folder: no hub."""

from pathlib import Path
from typing import Any

import pytest

from causal import COLOURS
from fedelta.errors import FedeltaError
from fedelta.runner import run

COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {kind}
doc_to_text: "the colour of {{{{article}}}} {{{{thing}}}} is :"
"""
GENERATED = """
doc_to_target: "{{answer}} ."
generation_kwargs: {until: ["</s>"], max_gen_toks: 3, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = f"""
doc_to_choice: [{", ".join(COLOURS.values())}]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_the_final_model_is_judged_by_generated_and_by_likely_answers(
    causal_config: Any, things: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, kind, rest in (("colours", "generate_until", GENERATED), ("choice", "multiple_choice", CHOSEN)):
        (folder / f"{name}.yaml").write_text(COMMON.format(name=name, rows=things, kind=kind) + rest)
    finished = run(
        causal_config(
            rounds=6,
            training={"epochs": 2, "batch_size": 8, "learning_rate": 0.02},
            evaluation={"harness": {"tasks": ["colours", "choice"], "include": str(folder), "limit": 40}},
        )
    )
    test = finished.result["test"]
    assert set(test) == {"loss", "perplexity", "colours/exact_match", "choice/acc"}
    assert test["colours/exact_match"] > 0.9
    assert test["choice/acc"] > 0.9
    assert test["loss"] < 0.5

    (folder / "broken.yaml").write_text(
        COMMON.format(name="broken", rows="nowhere.jsonl", kind="generate_until") + GENERATED
    )
    with pytest.raises(FedeltaError, match=r"evaluation\.harness: .*nowhere\.jsonl"):
        run(causal_config(name="y", rounds=1, evaluation={"harness": {"tasks": ["broken"], "include": str(folder)}}))
    with pytest.raises(FedeltaError, match="lm-evaluation-harness has no task 'colors'"):
        run(causal_config(name="x", evaluation={"harness": {"tasks": ["colors"], "include": str(folder)}}))


def test_the_harness_is_of_language_models(
    tiny_config: Any, causal_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FedeltaError, match=r"evaluation.harness is of language models, expected task: completion"):
        tiny_config(evaluation={"harness": {"tasks": ["gsm8k"]}})
    with pytest.raises(FedeltaError, match="method fedsa has no global model"):
        run(causal_config(method="fedsa", evaluation={"harness": {"tasks": ["gsm8k"]}}))
    monkeypatch.setattr("fedelta.harness.find_spec", lambda _: None)
    with pytest.raises(FedeltaError, match=r"evaluation.harness needs lm_eval: pip install 'fedelta\[harness\]'"):
        run(causal_config(evaluation={"harness": {"tasks": ["gsm8k"]}}))
