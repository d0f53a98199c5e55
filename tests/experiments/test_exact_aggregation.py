"""The grids of FedEx-LoRA (arXiv 2410.09432): the paper's protocol, and a start of every model of the full size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from fedelta.learning.tasks.completion import Completion
from fedelta.runs.config import Config, parse_config
from fedelta.runs.config_file import set_key
from fedelta.runs.runner import run
from fedelta.settings import quota
from fedelta.sweep.cells import Expansion
from fedelta.sweep.grid import load_grid
from paths import ROOT

FOLDER = ROOT / "experiments" / "exact_aggregation"
TASKS = {"CoLA": "matthews", "RTE": "accuracy", "MRPC": "accuracy", "SST-2": "accuracy", "QNLI": "accuracy"}
ARCHITECTURE = {"GPT-2": "gpt2", "Mistral-7B": "mistral", "Gemma-2-9B": "gemma2", "Llama-3.2-3B": "llama"}
LAYERS = {
    "gpt2": 2 * 3,  # c_attn, and the c_proj of attention and of the feed-forward part
    "mistral": 2 * 7,
    "gemma2": 2 * 7,
    "llama": 2 * 7,
}


def cells(grid: str, size: str, experiment: str, **values: str) -> dict[tuple[str, ...], Config]:
    """Values of the axes → configuration under the first seed."""
    expansion = Expansion(load_grid(FOLDER / f"{grid}.yaml", size), [experiment])
    plan = expansion.cells(None)
    return {
        tuple(place.values.values()): plan.cells[place.key]
        for place in plan.places
        if place.seed == 0 and all(place.values[axis] == value for axis, value in values.items())
    }


@pytest.mark.parametrize("grid", ["understanding", "generation"])
@pytest.mark.parametrize("size", ["small", "full"])
def test_both_sizes_are_grids_with_the_papers_federation(grid: str, size: str) -> None:
    loaded = load_grid(FOLDER / f"{grid}.yaml", size)
    expansion = Expansion(loaded)
    expansion.check()
    assert len(loaded.seeds) >= 3
    candidates: dict[Any, list[Any]] = {}
    plan, trials = expansion.trials()
    for trial in trials:
        candidates.setdefault(trial.values, []).append(trial.choice)
    assert len({json.dumps(choices) for choices in candidates.values()}) == 1, "one budget for all methods and tasks"
    tried, used = ({c.model.name for c in part.cells.values()} for part in (plan, expansion.cells(None)))
    assert tried == used, "each model is tuned by itself"
    first = next(iter(loaded.experiments))
    if size == "full":
        tasks = [config.task for config in plan.cells.values() if isinstance(config.task, Completion)]
        assert not any(task.generate for task in tasks), (
            "trials do not generate, because generated texts do not decide the choice"
        )
    for values, config in cells(grid, size, first).items():
        assert config.federation.participation == 1
        assert config.partition.kind == "iid"
        assert config.partition.clients == (1 if "centralized" in values else 3)
        assert config.ranks.high == 4


@pytest.mark.parametrize("size", ["small", "full"])
def test_clients_train_the_same_number_of_steps_for_any_number_of_clients(size: str) -> None:
    Expansion(load_grid(FOLDER / "when.yaml", size)).check()
    for experiment in ("when", "when-refresh"):
        steps = {config.training.steps for config in cells("when", size, experiment).values()}
        assert steps == {10 if size == "small" else 20}, "the number of steps does not depend on the number of rows"
    for config in cells("when", size, "when", participation="half").values():
        assert quota(config.federation.participation, config.partition.clients) > 1


def test_the_full_size_of_glue_has_the_settings_of_the_paper() -> None:
    configs = cells("understanding", "full", "glue", model="first")
    for (_, _, task, _), config in configs.items():
        training = config.training
        assert (config.rounds, training.epochs, training.batch_size) == (50, 3, 128)
        assert (training.schedule, training.warmup, config.lora.alpha, config.lora.dropout) == ("linear", 0.06, 8, 0.1)
        assert config.lora.target_modules == ("query", "value")
        assert config.task.metric == (TASKS | {"STS-B": "pearson"})[task]
        assert config.data.splits == {"test": "validation", "validation": None}


def shrunk(config: Config, **changes: Any) -> Config:
    """Shrink a configuration so that it starts quickly: two rounds, short texts, a local model."""
    data = config.dump()
    small = {
        "rounds": 2,
        "data.max_length": 32,
        "training.epochs": 1,
        "training.batch_size": 16,
        "evaluation.every": 1,
        "workers": 1,
    }
    for key, value in {**small, **changes}.items():
        set_key(data, key, value)
    return parse_config(data)


@pytest.mark.parametrize(
    ("model", "task", "method"),
    [
        ("first", "CoLA", "FedEx-LoRA"),
        ("first", "STS-B", "FFA-LoRA"),
        ("first", "MRPC", "FedSVD"),
        ("first", "SST-2", "centralized"),
        ("second", "RTE", "FedEx-LoRA"),
    ],
)
def test_glue_starts_with_a_roberta(model: str, task: str, method: str, tiny_bert: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_bert, model_input_names=["input_ids", "attention_mask"])
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    config = RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=40, pad_token_id=0, bos_token_id=2, eos_token_id=3, **shape
    )
    RobertaModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = []
    words = "ship wave tide reef cloud wing star moon hill root field stone".split()
    for i in range(200):
        one, two = words[i % 12], words[(i * 7) % 12]
        label = (i % 12) / 3 if task == "STS-B" else int(i % 12 > 5)
        rows.append({"sentence": f"the {one}", "sentence1": f"the {one}", "sentence2": f"a {two}", "label": label})
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.source": str(tmp_path), "data.configuration": None, "model.name": str(tmp_path / "model")}
    (config_of_paper,) = cells("understanding", "full", "glue", model=model, task=task, method=method).values()
    finished = run(shrunk(config_of_paper, output=str(tmp_path / "runs"), **changes))
    assert len(finished.records) == 2
    assert config_of_paper.task.metric in finished.result["test"]
    assert len(finished.result["clients"]) == (1 if method == "centralized" else 3)


@pytest.mark.parametrize("experiment", ["e2e", "arithmetic", "commonsense"])
def test_generation_starts_with_every_architecture(experiment: str, causal: Any, tmp_path: Path) -> None:
    rows = []
    for i in range(90):
        prompt, response = f"the color of a ship {'small ' * (i % 3)}is :", "red ."
        rows.append({"mr": prompt, "ref": response, "mr_id": i // 2, "query": prompt, "response": response})
        rows[-1] |= {"instruction": prompt, "output": response, "task": "boolq"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = set()
    for values, config in cells("generation", "full", experiment, method="FedEx-LoRA").items():
        (name,) = set(values) & set(ARCHITECTURE)
        models.add(name)
        changes: dict[str, Any] = {
            "model.name": str(causal(ARCHITECTURE[name])),
            "data.source": str(tmp_path / "rows.jsonl"),
            "data.test": 0.2,
            "data.validation": 0.1,
            "output": str(tmp_path / "runs"),
            "name": name,
            "evaluation.harness": None,
        }
        assert config.task.metric == ("exact_macro" if experiment == "commonsense" else "loss")
        if isinstance(config.task, Completion) and config.task.generate is not None:
            changes["task.generate.max_new_tokens"] = 8
        else:
            assert config.evaluation.harness is not None
            assert config.evaluation.harness.include == "experiments/exact_aggregation/harness"
        if experiment == "e2e":
            changes["task.scores"] = ["bleu", "nist", "rouge_l", "cider"]  # without METEOR, which starts Java
        finished = run(shrunk(config, **changes))
        assert len(finished.records) == 2
        modules = finished.records[0]["deviation"]
        assert len(modules) == LAYERS[ARCHITECTURE[name]]
        if experiment == "e2e":
            assert set(finished.result["test"]) > {"bleu", "nist", "rouge_l", "cider"}
    expected = {"e2e": {"GPT-2"}, "arithmetic": {"Mistral-7B", "Gemma-2-9B"}, "commonsense": {"Llama-3.2-3B"}}
    assert models == expected[experiment]
