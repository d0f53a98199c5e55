"""Folders that differ in modules, bases and weights: the mean, the sum, and what is said or refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from adapter_folders import FILE, classifier, distance_from_sum, edit_config, rewrite, save
from fedelta.aggregate.step import aggregate_folders
from fedelta.errors import FedeltaError
from fedelta.lora.files.peft_read import open_adapter
from fedelta.methods import make_method


def no_head(path: Path) -> Path:
    """Remove the classifier's head, as an adapter without one has it."""
    rewrite(path, lambda tensors: {key: tensor for key, tensor in tensors.items() if "lora_" in key})
    return edit_config(path, modules_to_save=None, task_type=None)


@pytest.fixture
def teams(tiny_bert: Path, tmp_path: Path) -> list[Path]:
    """Three teams: all layers, query only at another rank, and one layer by a pattern."""
    return [
        save(tmp_path / "one", tiny_bert, 0),
        save(tmp_path / "two", tiny_bert, 1, target_modules=["query"], r=2),
        save(tmp_path / "three", tiny_bert, 2, target_modules=r".*layer\.1.*(query|value)", r=4),
    ]


def test_a_missing_module_is_a_zero_update(teams: list[Path], tiny_bert: Path, tmp_path: Path) -> None:
    done = aggregate_folders(teams, tmp_path / "out", weights=[1, 2, 1])
    assert distance_from_sum(lambda: classifier(tiny_bert), teams, [1 / 4, 1 / 2, 1 / 4], tmp_path / "out") < 1.5e-6
    assert len(done.modules) == 5
    assert {report.ranks[0] for report in done.modules} == {0, 2}
    assert len(done.notes) == 3
    assert "two: does not adapt 3 of 5 modules (bert.encoder.layer.0.intermediate.dense, " in done.notes[1]
    with pytest.raises(FedeltaError, match=r"one: does not adapt 1 of 5 modules .*; refused by --strict"):
        aggregate_folders(teams, tmp_path / "strict", strict=True)


@pytest.mark.parametrize("name", ["flora", "replication", "hetlora", "flexlora"])
def test_a_method_takes_a_missing_module_as_rank_0(name: str, teams: list[Path], tmp_path: Path) -> None:
    done = aggregate_folders(teams, tmp_path / "out", method=make_method(name))
    assert len(done.modules) == 5
    if name == "flora":
        assert max(report.distance or 0 for report in done.modules) < 1e-5


def test_a_method_of_equal_ranks_refuses_a_missing_module(teams: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FedeltaError, match="method fedit needs equal ranks; module .* has rank"):
        aggregate_folders(teams[:2], tmp_path / "out", method=make_method("fedit"))


def test_a_head_that_only_some_have_is_refused_unless_the_other_weighs_nothing(
    teams: list[Path], tiny_bert: Path, tmp_path: Path
) -> None:
    no_head(teams[1])
    with pytest.raises(FedeltaError, match=r"two: no head classifier.bias, but .*one has one: .* there is no mean"):
        aggregate_folders(teams, tmp_path / "out")
    aggregate_folders(teams, tmp_path / "out", weights=[1, 0, 1])
    used = [teams[0], teams[2]]
    assert distance_from_sum(lambda: classifier(tiny_bert), used, [1 / 2, 1 / 2], tmp_path / "out") < 1.5e-6


def test_one_layer_under_two_names_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    paths = [no_head(save(tmp_path / str(i), tiny_bert, i)) for i in range(2)]
    rewrite(paths[1], lambda tensors: {key.replace("model.bert.", "model."): t for key, t in tensors.items()})
    with pytest.raises(FedeltaError, match="looks like bert.encoder.* one layer in two classes of one model"):
        aggregate_folders(paths, tmp_path / "out")


BASES: list[tuple[str, str, str]] = [
    ("/data/a/Llama-3-8B", "meta-llama/Llama-3-8B/", "note"),
    ("C:\\models\\llama-3-8b", "/cache/models--meta-llama--Llama-3-8B/snapshots/0123abc", "note"),
    ("unsloth/llama-3-8b-bnb-4bit", "meta-llama/Llama-3-8B", "may be a quantized copy"),
    ("unsloth/Llama-3.2-1B-unsloth-bnb-4bit", "unsloth/Llama-3.2-1B", "may be a quantized copy"),
    ("/runs/a/checkpoint-500", "/runs/b/checkpoint-500", "pass --base NAME if they are one model"),
    ("meta-llama/Llama-3-8B", "meta-llama/Llama-3-8B-Instruct", "pass --base NAME if they are one model"),
]


@pytest.mark.parametrize(("one", "two", "outcome"), BASES)
def test_names_of_the_base_are_compared_and_can_be_overridden(
    one: str, two: str, outcome: str, tiny_bert: Path, tmp_path: Path
) -> None:
    paths = [save(tmp_path / str(i), tiny_bert, i) for i in range(3)]
    for path, name in zip(paths, (one, two, None), strict=True):
        edit_config(path, base_model_name_or_path=name)
    if outcome == "note":
        done = aggregate_folders(paths, tmp_path / "out")
        assert done.base_model == one
        assert len(done.notes) == 1
        assert "is taken to be" in done.notes[0]
        with pytest.raises(FedeltaError, match="refused by --strict"):
            aggregate_folders(paths, tmp_path / "strict", strict=True)
    else:
        with pytest.raises(FedeltaError, match=outcome):
            aggregate_folders(paths, tmp_path / "out")
    done = aggregate_folders(paths, tmp_path / "named", base="meta-llama/Llama-3-8B", strict=True)
    assert open_adapter(tmp_path / "named").config["base_model_name_or_path"] == "meta-llama/Llama-3-8B"


def test_revisions_of_the_base_are_compared(tiny_bert: Path, tmp_path: Path) -> None:
    paths = [save(tmp_path / str(i), tiny_bert, i) for i in range(2)]
    edit_config(paths[0], revision=None)
    edit_config(paths[1], revision="main")
    aggregate_folders(paths, tmp_path / "same")
    edit_config(paths[1], revision="v2")
    with pytest.raises(FedeltaError, match=r"1: revision of the base v2, but .*0 has main"):
        aggregate_folders(paths, tmp_path / "out")
    aggregate_folders(paths[1:], tmp_path / "one")
    assert open_adapter(tmp_path / "one").config["revision"] == "v2"


SUMS: list[list[float]] = [[1, -1, 0.5], [2, 3, 4], [-1, -1, -1], [1e-30, 1, 1e-200], [0.3, 0, -0.3], [1e5, -1e5, 1]]


@pytest.mark.parametrize("weights", SUMS, ids=str)
def test_a_sum_takes_weights_as_they_are(
    weights: list[float], teams: list[Path], tiny_bert: Path, tmp_path: Path
) -> None:
    for path in teams:
        no_head(path)
    done = aggregate_folders(teams, tmp_path / "out", weights=weights, as_sum=True)
    assert distance_from_sum(lambda: classifier(tiny_bert), teams, weights, tmp_path / "out") < 1.5e-6
    assert [weight for _, weight in done.clients] == weights
    assert all(report.deviation is None for report in done.modules)


def test_a_sum_of_whole_heads_needs_weights_that_sum_to_1(teams: list[Path], tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(FedeltaError, match="head classifier.bias is saved whole: .* sum to 1"):
        aggregate_folders(teams, tmp_path / "out", weights=[1, 1, -0.5], as_sum=True)
    aggregate_folders(teams, tmp_path / "out", weights=[1, 0.75, -0.75], as_sum=True)
    assert distance_from_sum(lambda: classifier(tiny_bert), teams, [1, 0.75, -0.75], tmp_path / "out") < 1.5e-6


def test_a_sum_that_cancels_is_zero_and_said(tiny_bert: Path, tmp_path: Path) -> None:
    path = no_head(save(tmp_path / "one", tiny_bert))
    done = aggregate_folders([path, path], tmp_path / "out", weights=[1, -1], as_sum=True)
    assert {report.norm for report in done.modules} == {0.0}
    assert done.notes == (f"{path}: given and counted 2 times",)


@pytest.mark.parametrize(
    ("weights", "options", "expected"),
    [
        ([1, -1], {}, r"weight -1 of .*1: expected a number ≥ 0 for a mean; --sum takes weights as they are"),
        ([1, math.inf], {}, "weight inf of .*1: expected a finite number"),
        ([1, math.nan], {"as_sum": True}, "weight nan of .*1: expected a finite number"),
        ([0, 0], {"as_sum": True}, "all weights are 0"),
        ([1, 1], {"as_sum": True, "method": "fedex"}, "--sum adds adapters up, and a step of fedex is a mean"),
        ([1e300, 1], {"as_sum": True}, r"does not fit into fp32; the largest update there is that of .*0, of norm"),
        ([1e-300, -1e-300], {"as_sum": True}, "the result is about .*, too small for fp32"),
    ],
)
def test_weights_that_have_no_result_are_one_line(
    weights: list[float], options: dict[str, Any], expected: str, tiny_bert: Path, tmp_path: Path
) -> None:
    paths = [no_head(save(tmp_path / str(i), tiny_bert, i)) for i in range(2)]
    if "method" in options:
        options = {**options, "method": make_method(options["method"])}
    with pytest.raises(FedeltaError, match=expected) as refused:
        aggregate_folders(paths, tmp_path / "out", weights=weights, **options)
    assert "\n" not in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


@pytest.mark.parametrize("weights", [[1e300, 3e300], [1e-300, 3e-300], [5e-324, 1.5e-323], [5e307, 1.5e308]])
def test_a_mean_depends_on_ratios_of_weights_only(weights: list[float], tiny_bert: Path, tmp_path: Path) -> None:
    paths = [save(tmp_path / str(i), tiny_bert, i) for i in range(2)]
    aggregate_folders(paths, tmp_path / "out", weights=weights)
    assert distance_from_sum(lambda: classifier(tiny_bert), paths, [1 / 4, 3 / 4], tmp_path / "out") < 1.5e-6


@pytest.mark.parametrize("method", [None, "fedex", "flora", "replication", "hetlora", "flexlora"])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 1e30), ("bfloat16", 1e30), ("float32", 1e18)])
def test_large_factors_give_a_finite_result_or_one_line(
    dtype: str, size: float, method: str | None, tiny_bert: Path, tmp_path: Path
) -> None:
    paths = [save(tmp_path / str(i), tiny_bert, i, target_modules=["query"]) for i in range(2)]
    for path in paths:
        rewrite(
            path,
            lambda tensors: {
                key: (tensor.sign() * size if "lora_" in key else tensor).to(getattr(torch, dtype))
                for key, tensor in tensors.items()
            },
        )
    if size > 1e20:
        with pytest.raises(FedeltaError, match=rf"{tmp_path}.*module bert.encoder.layer.0.attention.self.query"):
            aggregate_folders(paths, tmp_path / "out", method=method and make_method(method))
        assert not (tmp_path / "out").exists()
        return
    aggregate_folders(paths, tmp_path / "out", method=method and make_method(method))
    for pair in open_adapter(tmp_path / "out").read().values():
        assert torch.isfinite(pair.scale * pair.B @ pair.A).all()


def test_heads_that_do_not_fit_into_their_dtype_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    paths = [save(tmp_path / str(i), tiny_bert, i) for i in range(2)]
    for path in paths:
        rewrite(
            path,
            lambda tensors: {
                key: tensor if "lora_" in key else torch.full_like(tensor, 6e4).half()
                for key, tensor in tensors.items()
            },
        )
    head = safetensors.torch.load_file(paths[0] / FILE)["base_model.model.classifier.bias"]
    assert head.dtype == torch.float16
    aggregate_folders(paths, tmp_path / "mean", weights=[1, 3])
    rewrite(paths[1], lambda tensors: {k: t if "lora_" in k else -t for k, t in tensors.items()})
    with pytest.raises(FedeltaError, match="head classifier.bias: the result does not fit into torch.float16"):
        aggregate_folders(paths, tmp_path / "out", weights=[1.5, -0.5], as_sum=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrapper", ["module.", "default.", "base_model.model."])
def test_a_wrapper_inside_of_names_is_not_taken_for_another_module(
    wrapper: str, tiny_bert: Path, tmp_path: Path
) -> None:
    plain, wrapped = (save(tmp_path / name, tiny_bert, seed) for seed, name in enumerate(("plain", "wrapped")))
    rename = "attention.", f"attention.{wrapper}"
    rewrite(wrapped, lambda tensors: {key.replace(*rename): tensor for key, tensor in tensors.items()})
    with pytest.raises(FedeltaError, match=r"inside of a wrapper|looks like"):
        aggregate_folders([str(plain), str(wrapped)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
