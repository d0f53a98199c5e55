"""Damaged and unusual adapter folders: the exact mean as PEFT sees it, or a refusal."""

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fuzzing import damage_to_folder, fuzz, json_text, numbers, outcome, texts, values

FILES = ["adapter_config.json", "adapter_model.safetensors"]
WEIGHTS = "adapter_model.safetensors"


class Block(nn.Module):
    """One attention-like block, in_features ≠ out_features."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 5)
        self.v = nn.Linear(6, 4)


class Base(nn.Module):
    """A base model without a configuration, which PEFT accepts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of one base, of unequal rank and α."""
    folders = []
    for name, rank, alpha in (("a", 2, 4), ("b", 3, 12)):
        torch.manual_seed(rank)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q", "v"], init_lora_weights=False)
        folder = tmp_path_factory.mktemp(name)
        peft.get_peft_model(Base(), config).save_pretrained(folder)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "org/base"}))
        folders.append(folder)
    return folders


def product(folder: Path) -> dict[str, Tensor] | None:
    """ΔW of every module in float64, as PEFT loads the folder; None if it does not load it whole."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = peft.PeftModel.from_pretrained(Base(), folder)
    except Exception:
        return None
    found: dict[str, Tensor] = {}
    stored = safetensors.torch.load_file(folder / WEIGHTS)
    for name, module in model.named_modules():
        if not isinstance(module, peft.tuners.lora.LoraLayer):
            continue
        key = name.removeprefix("base_model.model.")
        if f"base_model.model.{key}.lora_B.weight" not in stored:
            continue
        A, B = (getattr(module, f"lora_{x}")["default"].weight.detach().double() for x in "AB")
        found[key] = module.scaling["default"] * B @ A
    expected = {key.rsplit(".lora_", 1)[0].removeprefix("base_model.model.") for key in stored if ".lora_" in key}
    return found if set(found) == expected else None


def check_mean(output: Path, folders: list[Path], weights: list[float]) -> None:
    """The output loads in PEFT, is finite, and is the mean of the folders that PEFT loads."""
    found = product(output)
    assert found, "PEFT does not load the output"
    assert all(bool(torch.isfinite(delta).all()) for delta in found.values())
    json.loads((output / "adapter_config.json").read_text(), parse_constant=pytest.fail)
    inputs = [product(folder) for folder in folders]
    if any(one is None for one in inputs):
        return
    for module in {name for one in inputs for name in one or {}}:
        terms = [w * one[module] for w, one in zip(weights, inputs, strict=True) if one and module in one]
        mean = sum(terms, torch.zeros(())) / sum(weights)
        size = max(1.0, *(float(term.abs().max()) for term in terms))
        assert torch.allclose(found[module], mean, rtol=0, atol=1e-5 * size), module


def aggregate(pristine: list[Path], change: Callable[[Path], Any], weights: str | None = None) -> None:
    """Aggregate the two folders, the first of them changed."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / "in" / name for name in "ab"]
        for folder, source in zip(folders, pristine, strict=True):
            shutil.copytree(source, folder)
        change(folders[0])
        output = Path(scratch) / "out"
        options = [] if weights is None else [f"--weights={weights}"]
        line = outcome("adapter folders", "aggregate", *map(str, folders), "-o", str(output), *options, output=output)
        if line is None:
            given_weights = [1.0, 1.0] if weights is None else [float(part) for part in weights.split(",")]
            check_mean(output, folders, given_weights)


@fuzz(examples=60)
@given(change=damage_to_folder(FILES))
def test_a_damaged_folder_is_refused_or_its_mean_is_right(pristine: list[Path], change: Callable[[Path], Any]) -> None:
    aggregate(pristine, change)


FIELDS = [
    *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules", "bias"),
    *("fan_in_fan_out", "init_lora_weights", "modules_to_save", "layers_to_transform", "target_parameters"),
    *(
        "base_model_name_or_path",
        "revision",
        "peft_type",
        "task_type",
        "lora_bias",
        "unknown",
        "trainable_token_indices",
    ),
]


@fuzz(examples=60)
@given(field=st.sampled_from(FIELDS), value=values())
def test_a_configuration_field_of_any_value_is_refused_or_the_mean_is_right(
    pristine: list[Path], field: str, value: Any
) -> None:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json_text(json.loads(file.read_text()) | {field: value}))

    aggregate(pristine, change)


@st.composite
def changed_tensors(draw: st.DrawFn) -> Callable[[Path], None]:
    """Other names, types, shapes and values of the stored tensors."""
    kind = draw(st.sampled_from(["rename", "drop", "dtype", "shape", "value", "copy"]))
    insert = draw(st.sampled_from(["module.", "_orig_mod.", "_fsdp_wrapped_module.", "default.", "base_model.model."]))
    every = draw(st.booleans())
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64]
    dtype = draw(st.sampled_from(kinds))
    number, other, which = float(draw(numbers())), draw(texts()), draw(st.integers(0, 7))
    shape = draw(st.sampled_from([(0,), (), (1,), (2, 0), (5, 2), (2, 6, 1)]))
    where = draw(st.sampled_from(["front", "middle", "end"]))

    def renamed(key: str) -> str:
        if where == "front":
            return insert + key
        if where == "end":
            return key.replace(".weight", f".{insert}weight")
        head, tail = key.split("layers.")
        return f"{head}layers.{tail.replace('.', f'.{insert}', 1)}"

    def apply(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        chosen = list(tensors) if every else [sorted(tensors)[which]]
        for key in chosen:
            tensor = tensors.pop(key)
            if kind == "rename":
                tensors[renamed(key) if where != "end" or insert == "default." else other + key] = tensor
            elif kind == "dtype":
                tensors[key] = tensor.to(dtype)
            elif kind == "shape":
                tensors[key] = torch.ones(shape)
            elif kind == "value":
                tensors[key] = tensor * number
            elif kind == "copy":
                tensors |= {key: tensor, renamed(key): tensor.clone()}
        safetensors.torch.save_file(tensors, folder / WEIGHTS)

    return apply


@fuzz(examples=60)
@given(change=changed_tensors(), weights=st.none() | st.tuples(numbers(), numbers()))
def test_tensors_of_any_name_type_and_value_are_refused_or_the_mean_is_right(
    pristine: list[Path], change: Callable[[Path], Any], weights: tuple[Any, Any] | None
) -> None:
    aggregate(pristine, change, None if weights is None else f"{weights[0]},{weights[1]}")
