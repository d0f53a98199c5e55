"""Reading and writing of PEFT folders, compared with PEFT."""

import json
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForSequenceClassification

from fedelta.errors import FedeltaError
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.files.peft_read import open_adapter
from fedelta.lora.files.peft_write import write_adapter

PREFIX = "base_model.model."


def base(folder: Path) -> torch.nn.Module:
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)


def by_peft(folder: Path, model: Path, **options: object) -> peft.PeftModel:
    """An adapter with random weights, saved by PEFT."""
    config = peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, **options)
    wrapped = peft.get_peft_model(base(model), config)
    wrapped.save_pretrained(folder)
    return wrapped


def deltas(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    """ΔW of each layer as PEFT computes it, out×in."""
    result = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            delta = layer.get_delta_weight("default")
            result[name.removeprefix(PREFIX)] = delta.T if layer.fan_in_fan_out else delta
    return result


CASES = {
    "plain": ("tiny_bert", {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}),
    "rslora": ("tiny_bert", {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["query", "dense"]}),
    "patterns": (
        "tiny_bert",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["query", "value"],
            "rank_pattern": {"layer.0.attention.self.query": 2, "value": 6},
            "alpha_pattern": {"layer.1.attention.self.value": 3},
        },
    ),
    "conv1d": ("tiny_gpt2", {"r": 3, "lora_alpha": 7, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc"]}),
    "pooler": ("tiny_bert", {"r": 2, "target_modules": ["query"], "modules_to_save": ["bert.pooler"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_written_by_peft_has_the_same_update_here(
    case: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fixture, options = CASES[case]
    model = by_peft(tmp_path / "a", request.getfixturevalue(fixture), **options)
    found = open_adapter(tmp_path / "a")
    expected = deltas(model)
    assert set(found.read()) == set(expected)
    for module, pair in found.read().items():
        assert torch.allclose(pair.scale * pair.B @ pair.A, expected[module], atol=1e-5)
    saved = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {PREFIX + name for name in found.heads} == {key for key in saved if "lora_" not in key}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_written_here_has_the_same_update_in_peft(
    case: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """This includes mixed ranks and scales, which are written as one rank and one α."""
    fixture, options = CASES[case]
    by_peft(tmp_path / "a", request.getfixturevalue(fixture), **options)
    found = open_adapter(tmp_path / "a")
    heads = {name: tensor + 1 for name, tensor in found.read_heads().items()}
    write_adapter(
        tmp_path / "b",
        found.read(),
        heads,
        base_model="x",
        modules_to_save=found.config["modules_to_save"],
        fan_in_fan_out=found.config["fan_in_fan_out"],
    )
    loaded = peft.PeftModel.from_pretrained(base(request.getfixturevalue(fixture)), tmp_path / "b")
    for module, delta in deltas(loaded).items():
        pair = found.read()[module]
        assert torch.allclose(delta, pair.scale * pair.B @ pair.A, atol=1e-5)
    state = loaded.state_dict()
    for name, tensor in heads.items():
        module, parameter = name.rsplit(".", 1)
        wrapped = [k for k in state if "modules_to_save" in k and k.endswith(parameter) and module.split(".")[0] in k]
        assert any(torch.equal(state[key], tensor) for key in wrapped), name
    again = open_adapter(tmp_path / "b")
    assert len({pair.rank for pair in again.read().values()}) == 1


def test_writing_and_reading_equal_scales_keeps_the_bits(tmp_path: Path) -> None:
    adapter = Adapter({m: LoraPair(torch.randn(3, 5), torch.randn(4, 3), 2.0) for m in "ab"})
    write_adapter(tmp_path / "x", adapter, {}, base_model="m")
    again = open_adapter(tmp_path / "x").read()
    for module, pair in adapter.items():
        assert torch.equal(again[module].A, pair.A)
        assert torch.equal(again[module].B, pair.B)
        assert again[module].scale == pair.scale
    modes = {file.stat().st_mode & 0o044 for file in (tmp_path / "x").iterdir()}
    assert len(modes) == 1, "whoever may read the configuration may read the weights"


@pytest.fixture
def folder(tmp_path: Path, tiny_bert: Path) -> Path:
    by_peft(tmp_path / "a", tiny_bert, r=4, target_modules=["query", "value"])
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "use_dora is not supported: DoRA rescales"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"bias": "all"}, "bias=.all. is not supported: it trains biases"),
        ({"peft_type": "IA3"}, "a IA3 adapter, expected LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "moves a part of the base weight"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is not supported"),
        ({"r": 0}, "r is 0, expected a whole number from 1"),
        ({"r": 3}, "has rank 4, but adapter_config.json says 3"),
        (
            {"rank_pattern": {"layer.1.attention.self.query": 2}},
            "layer.1.attention.self.query has rank 4, but .* says 2",
        ),
    ],
)
def test_an_unsupported_folder_is_refused(folder: Path, change: dict, reason: str) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(FedeltaError, match=reason):
        open_adapter(folder).read()


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file) | change
    safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items() if t is not None}, file)


QUERY = f"{PREFIX}bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({f"{QUERY}.lora_B.weight": None}, "query has no lora_B"),
        ({f"{QUERY}.lora_A.weight": torch.full((4, 24), float("nan"))}, "A holds NaN or infinite"),
        ({f"{QUERY}.lora_B.weight": torch.ones(24, 3)}, "do not share a rank"),
        ({f"{QUERY}.lora_magnitude_vector": torch.ones(24)}, "lora_magnitude_vector"),
        ({f"{QUERY}.lora_B.bias": torch.ones(24)}, "expected only weights of lora_A and lora_B"),
        ({"something.else": torch.ones(2)}, "unexpected tensor something.else"),
    ],
)
def test_damaged_weights_are_refused(folder: Path, change: dict, reason: str) -> None:
    rewrite(folder, change)
    with pytest.raises(FedeltaError, match=reason):
        open_adapter(folder).read()


def test_a_truncated_file_is_refused(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FedeltaError, match="adapter_model.safetensors: "):
        open_adapter(folder).read()


def test_a_pickle_is_never_loaded(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FedeltaError, match="is a pickle.*save it again"):
        open_adapter(folder).read()


def test_missing_files_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FedeltaError, match="nowhere: no such folder"):
        open_adapter(tmp_path / "nowhere").read()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FedeltaError, match="no adapter_model.safetensors"):
        open_adapter(folder).read()
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FedeltaError, match="no adapter_config.json"):
        open_adapter(folder).read()
