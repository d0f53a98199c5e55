"""The protocol of Byun & Lee (arXiv 2406.17477): the paper's parameter counts, and the grid in both sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
)

from command import fedelta
from fedelta.federation.ranks import initial_ranks
from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.lora.adapter import initial_adapter
from fedelta.sweep.cells import Expansion
from fedelta.sweep.grid import load_grid
from fedelta.sweep.results import read_rows
from paths import ROOT

GRID = ROOT / "experiments" / "rank_heterogeneity" / "grid.yaml"
FIGURE_2 = [
    *("homogeneous, rank 5", "homogeneous, rank 7", "homogeneous, rank 20"),
    *("zero padding", "HetLoRA weights", "replication"),
    *("FedEx with replication", "raFLoRA", "FlexLoRA", "FLoRIST", "FLoRA", "Fed-PLoRA"),
]


@pytest.mark.parametrize("size", ["small", "full"])
def test_both_sizes_follow_the_protocol_of_the_paper(size: str) -> None:
    grid = load_grid(GRID, size)
    expansion = Expansion(grid)
    expansion.check()
    plan = expansion.cells(None)
    cells = [place for place in plan.places if place.experiment == "figure-2"]
    assert {place.values["method"] for place in cells} == set(FIGURE_2)
    assert len(cells) == 12 * 2 * 2 * len(grid.seeds)
    assert len(grid.seeds) >= 3
    for place in cells:
        config = plan.cells[place.key]
        assert (config.partition.clients, config.partition.share) == (100, 0.1)
        assert config.federation.round_size(100) == 10
        assert (config.training.epochs, config.training.steps) == (1, None)
        if not place.values["method"].startswith("homogeneous"):
            assert (config.ranks.allocation, config.ranks.low, config.ranks.high, config.ranks.share) == (
                *("loss", 5, 20),
                0.1,
            )
    # The same candidates and the same seeds for every method.
    trials = expansion.trials()[1]
    by_values: dict[tuple[str, ...], list[Any]] = {}
    for trial in trials:
        by_values.setdefault(trial.values, []).append(trial.choice)
    everywhere = {(method, data) for method in FIGURE_2 for data in ("AG News", "DBpedia")}
    assert set(by_values) == everywhere | {("HetLoRA", "AG News")}
    assert all(choices == by_values["replication", "AG News"] for choices in by_values.values())


def test_lora_parameters_of_distilbert_are_those_of_the_paper() -> None:
    base = AutoModelForSequenceClassification.from_config(DistilBertConfig(num_labels=4))
    first = load_grid(GRID, "full").axes["encoder"]["first"]
    model = LoraModel(base, LoraSettings(target_modules=tuple(first["lora.target_modules"])))
    assert len(model.shapes) == 6 * 3
    assert set(model.shapes.values()) == {(768, 768)}
    largest = initial_adapter(model.shapes, 20, 0)
    assert largest.parameters == 552_960
    assert largest.parameters * 4 / 2**20 == pytest.approx(2.11, abs=0.005)
    # Ten of a hundred clients have rank 20, the others 5. The paper says 179,715; 6.5 ranks of 27,648 are 179,712.
    plan = Expansion(load_grid(GRID, "full"), ["figure-4"], {"allocation": ["oracle"]}).cells(None)
    config = next(iter(plan.cells.values()))
    ranks = initial_ranks([f"client-{i:03d}" for i in range(100)], config.ranks, 0)
    average = sum(largest.truncate(rank).parameters for rank in ranks.values()) / 100
    assert average == 179_712
    assert average * 4 / 2**20 == pytest.approx(0.69, abs=0.005)


def _save(model: Any, folder: Path, tiny_bert: Path) -> Path:
    """Save random weights and a small tokenizer in a folder that replaces a model of the hub."""
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_bert)
    tokenizer.add_tokens([f"[unused{i}]" for i in range(model.config.vocab_size - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["first", "second"])
def test_the_full_size_runs_two_rounds_with_its_models_from_their_configurations(
    encoder: str, tiny_bert: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    if encoder == "first":
        model: Any = DistilBertModel(DistilBertConfig())
    else:
        # albert-base-v2; the defaults of AlbertConfig are those of xxlarge.
        model = AlbertModel(AlbertConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072))
    folder = _save(model, tmp_path / "model", tiny_bert)
    rows = ["text,label"]
    words = "ship wave tide reef cloud wing star moon hill root field stone".split()
    for i in range(700):
        rows.append(f"the {words[i % 12]} and a {words[(i * 7) % 12]},{i % 4}")
    (tmp_path / "texts.csv").write_text("\n".join(rows) + "\n")
    overrides = [f"model.name={folder}", f"data.source={tmp_path / 'texts.csv'}", "rounds=2", "evaluation.every=1"]
    selection = ["--only", "figure-2", "--where", f"encoder={encoder}", "--where", "data=AG News"]
    selection += ["--where", "method=replication", "--where", "method=FedEx with replication"]
    output = tmp_path / "results"
    assert fedelta("sweep", str(GRID), "--size", "full", "--no-tuning", "-o", str(output), *selection, *overrides) == 0
    stored_rows = read_rows(output)
    assert len(stored_rows) == 2 * 3
    for row in stored_rows.values():
        assert (len(row["rounds"]), row["failed"]) == (2, None)
        parameters = {"5": 138_240, "20": 552_960} if encoder == "first" else {"5": 23_040, "20": 92_160}
        assert row["lora_parameters"] == parameters
    assert (output / "report.md").exists()
    stored = yaml.safe_load((output / "grid.yaml").read_text())
    assert stored["overrides"]["rounds"] == 2
