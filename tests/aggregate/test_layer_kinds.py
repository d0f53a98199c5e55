"""Embeddings, convolutions and experts have the same exact mean as linear layers, measured in PEFT's merged weights."""

from pathlib import Path
from typing import Any

import pytest

from adapter_folders import Parts, distance_from_sum, edit_config, save_parts
from fedelta.aggregate.step import aggregate_folders
from fedelta.errors import FedeltaError
from fedelta.methods import make_method

GATE, DOWN = "mlp.experts.gate_up_proj", "experts.down_proj"
KINDS: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["tokens"]},
    "convolutions": {"target_modules": ["image", "point", "sound"]},
    "experts": {"target_modules": [], "target_parameters": [GATE]},
    "two parameters of one module": {"target_modules": [], "target_parameters": [GATE, DOWN]},
    "a matrix as a parameter": {"target_modules": [], "target_parameters": ["router.weight"]},
    "all": {"target_modules": ["tokens", "image", "proj"], "target_parameters": [GATE, DOWN]},
}


@pytest.mark.parametrize("transposed", [True, False], ids=["in×out", "out×in"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_that_of_merged_weights_at_mixed_ranks(kind: str, transposed: bool, tmp_path: Path) -> None:
    ranks = [(2, 4, False), (3, 9, True), (1, 1, False)]
    paths = [
        save_parts(tmp_path / str(i), i, transposed, r=r, lora_alpha=alpha, use_rslora=rslora, **KINDS[kind])
        for i, (r, alpha, rslora) in enumerate(ranks)
    ]
    aggregate_folders(paths, tmp_path / "out", weights=[1, 3, 4])
    assert distance_from_sum(lambda: Parts(transposed), paths, [1 / 8, 3 / 8, 4 / 8], tmp_path / "out") < 1.5e-6
    aggregate_folders(paths, tmp_path / "sum", weights=[1, -2, 0.5], as_sum=True)
    assert distance_from_sum(lambda: Parts(transposed), paths, [1, -2, 0.5], tmp_path / "sum") < 1.5e-6


def test_folders_that_adapt_different_kinds_have_a_mean(tmp_path: Path) -> None:
    paths = [save_parts(tmp_path / name.replace(" ", "-"), i, **KINDS[name]) for i, name in enumerate(KINDS)]
    del paths[3], paths[2]  # the experts of one parameter and of two are not the same tensors
    done = aggregate_folders(paths, tmp_path / "out")
    assert distance_from_sum(Parts, paths, [1 / 4] * 4, tmp_path / "out") < 1.5e-6
    assert len(done.notes) == 4


@pytest.mark.parametrize("name", ["flora", "flexlora", "hetlora", "replication", "florist"])
def test_methods_work_on_each_expert_and_embedding(name: str, tmp_path: Path) -> None:
    paths = [save_parts(tmp_path / str(i), i, r=r, **KINDS["all"]) for i, r in enumerate((2, 3))]
    done = aggregate_folders(paths, tmp_path / "out", method=make_method(name))
    distance = distance_from_sum(Parts, paths, [1 / 2, 1 / 2], tmp_path / "out")
    if name == "flora":
        assert distance < 1e-5
    if name != "hetlora":  # it weighs by norms, and its distance is measured from that mean
        overall = max(report.distance or 0.0 for report in done.modules)
        assert distance <= overall + 1e-6


def test_a_base_patch_of_an_embedding_needs_single(tmp_path: Path) -> None:
    paths = [save_parts(tmp_path / str(i), i, **KINDS["embedding"]) for i in range(2)]
    with pytest.raises(FedeltaError, match=r"module tokens is not a linear layer \(embedding\); add --single"):
        aggregate_folders(paths, tmp_path / "out", method=make_method("fedex"))
    assert not (tmp_path / "out").exists()
    aggregate_folders(paths, tmp_path / "out", method=make_method("fedex"), single=True)
    assert distance_from_sum(Parts, paths, [1 / 2, 1 / 2], tmp_path / "out") < 1.5e-6


def test_tensors_that_may_belong_to_another_parameter_are_refused(tmp_path: Path) -> None:
    one = save_parts(tmp_path / "one", 0, **KINDS["experts"])
    two = save_parts(tmp_path / "two", 1, **KINDS["two parameters of one module"])
    with pytest.raises(FedeltaError, match="adapts the parameters|is out×in"):
        aggregate_folders([one, two], tmp_path / "out")
    edit_config(one, rank_pattern={"gate_up_proj": 3})
    with pytest.raises(FedeltaError, match=r"rank_pattern or alpha_pattern of the parameter mlp.experts.gate_up_proj"):
        aggregate_folders([one], tmp_path / "out")
    edit_config(one, rank_pattern={}, target_parameters=None)
    with pytest.raises(FedeltaError, match="has rank 9, but adapter_config.json says 3"):
        aggregate_folders([one], tmp_path / "out")
