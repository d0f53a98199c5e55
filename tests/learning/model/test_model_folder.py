"""A model's folder is checked before anything is built from it, and its weights must be those of the model."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, BertForSequenceClassification

from fedelta.errors import FedeltaError
from fedelta.learning.model.base_model import ModelKind, ModelSettings, load_base, load_tokenizer

WEIGHTS = "model.safetensors"


def load(folder: Path, kind: ModelKind = "completion", classes: int = 0) -> Any:
    settings = ModelSettings(name=str(folder))
    return load_base(settings, classes, load_tokenizer(settings), 0, kind)


def refusal(folder: Path, kind: ModelKind = "completion", classes: int = 0) -> str:
    start = time.monotonic()
    with pytest.raises(FedeltaError) as refused:
        load(folder, kind, classes)
    assert time.monotonic() - start < 10
    text = str(refused.value).replace(str(folder), "FOLDER")
    assert len(text) < 300
    assert "\n" not in text
    return text


def change_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def shard(folder: Path) -> None:
    """Divide the weights into two files with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file, {"format": "pt"})
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_hidden_layers": 10**6}, "config.json sets num_hidden_layers to 1000000, but the weights are 20 tensors"),
        ({"hidden_size": 10**6, "head_dim": 500_000}, "config.json describes"),
        ({"intermediate_size": 10**9}, "config.json describes"),
        ({"vocab_size": 10**9}, "config.json describes"),
        ({"num_hidden_layers": 3}, "its files lack the weight model.layers.2"),
        ({"intermediate_size": 48}, "weight model.layers.0.mlp.down_proj.weight is (24, 40) in its files, (24, 48) by"),
        ({"num_hidden_layers": "two"}, ""),
        ({"num_hidden_layers": -1}, "config.json sets num_hidden_layers to -1"),
        ({"hidden_size": 0}, ""),
        ({"rms_norm_eps": float("nan")}, "it computes NaN or infinity"),
        ({"hidden_act": "no-such-function"}, "KeyError: 'no-such-function'"),
        ({"num_attention_heads": 0}, ""),
        ({"model_type": "no-such-model"}, "no-such-model"),
        ({"model_type": None}, ""),
        ({"rope_parameters": [1]}, ""),
        ({"auto_map": {"AutoConfig": "code.Config"}, "model_type": "own"}, ""),
    ],
)
def test_a_configuration_that_its_weights_contradict_is_refused(fields: dict, reason: str, copy_of: Any) -> None:
    assert reason in refusal(copy_of("llama", config=fields))


def test_fewer_layers_than_in_the_files_are_said(copy_of: Any) -> None:
    with pytest.warns(UserWarning, match=r"weight model\.layers\.1\.\S+ and 8 more in its files is not used"):
        load(copy_of("llama", config={"num_hidden_layers": 1}))


def test_a_missing_weight_is_never_drawn_at_random(copy_of: Any) -> None:
    folder = copy_of("llama")
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    for kind, classes in (("completion", 0), ("classification", 3)):
        assert "its files lack the weight model.layers.1.mlp.up_proj.weight" in refusal(folder, kind, classes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, copy_of: Any) -> None:
    folder = copy_of("llama")
    change_weights(folder, lambda tensors: tensors["model.embed_tokens.weight"][25].fill_(value))
    assert "weight model.embed_tokens.weight holds NaN or infinity in 24 of 624 numbers" in refusal(folder)


def test_pickled_weights_are_never_opened(copy_of: Any, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "opened",))

    folder = copy_of("llama")
    (folder / WEIGHTS).unlink()
    torch.save({"x": Touch()}, folder / "pytorch_model.bin")
    assert refusal(folder) == (
        "model FOLDER: it holds pytorch_model.bin, whose pickled weights can run code: "
        "convert them to model.safetensors"
    )
    assert not (tmp_path / "opened").exists()


def damage(folder: Path, how: str) -> None:
    index = folder / f"{WEIGHTS}.index.json"
    if how == "no weights":
        (folder / WEIGHTS).unlink()
    elif how == "pointer":
        (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    elif how == "cut":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    elif how == "empty":
        (folder / WEIGHTS).write_bytes(b"")
    elif how == "deep":
        (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    elif how == "list":
        (folder / "config.json").write_text("[1]")
    elif how == "large":
        (folder / "config.json").write_text(json.dumps({"x": "y" * 70_000_000}))
    elif how == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    elif how == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif how == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    else:
        shard(folder)
        if how == "lost shard":
            (folder / "model-00002-of-00002.safetensors").unlink()
        elif how == "broken link":
            (folder / "model-00002-of-00002.safetensors").unlink()
            (folder / "model-00002-of-00002.safetensors").symlink_to(folder / "nowhere")
        elif how == "outside":
            content = json.loads(index.read_text())
            content["weight_map"]["model.norm.weight"] = "../../secret.safetensors"
            index.write_text(json.dumps(content))
        elif how == "no map":
            index.write_text("{}")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("no weights", "model FOLDER: it holds no weights, expected model.safetensors"),
        ("pointer", "FOLDER/model.safetensors: it is a Git LFS pointer, not weights: git lfs pull"),
        ("cut", "FOLDER/model.safetensors: "),
        ("empty", "FOLDER/model.safetensors: "),
        ("deep", "FOLDER/config.json is not JSON: "),
        ("list", "FOLDER/config.json holds a list, expected a JSON object"),
        ("large", "FOLDER/config.json has more than 64 MB"),
        ("adapter", "model FOLDER: it also holds an adapter (adapter_config.json); expected a model alone"),
        ("tokenizer", "tokenizer of model FOLDER: "),
        ("no tokenizer", "tokenizer of model FOLDER: "),
        ("lost shard", "model FOLDER: model-00002-of-00002.safetensors is missing, one of 2 files of its weights"),
        ("broken link", "model FOLDER: model-00002-of-00002.safetensors is missing, one of 2 files of its weights"),
        (
            "outside",
            "FOLDER/model.safetensors.index.json names '../../secret.safetensors', expected a safetensors file",
        ),
        ("no map", "FOLDER/model.safetensors.index.json: expected weight_map, from tensors to files"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(how: str, reason: str, copy_of: Any) -> None:
    folder = copy_of("llama")
    damage(folder, how)
    assert refusal(folder).startswith(reason)


def test_links_to_files_are_followed_as_in_the_cache_of_a_hub(copy_of: Any, tmp_path: Path) -> None:
    folder = copy_of("llama")
    (folder / WEIGHTS).rename(tmp_path / "blob")
    (folder / WEIGHTS).symlink_to(tmp_path / "blob")
    assert load(folder) is not None


@pytest.mark.parametrize("classes", [3, 5])
def test_a_base_that_classifies_into_other_classes_gets_a_new_head(classes: int, copy_of: Any) -> None:
    folder = copy_of("bert")
    torch.manual_seed(1)
    trained = BertForSequenceClassification(AutoConfig.from_pretrained(folder, num_labels=3))
    trained.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    trained.save_pretrained(folder)
    said = (
        "training continues from its own head, trained for bad, fair, good; classes take its outputs in their order"
        if classes == 3
        else "its head classifier has 3 outputs, the data need 5; a new head replaces it"
    )
    with pytest.warns(UserWarning, match=said):
        model = load(folder, "classification", classes)
    assert model.classifier.weight.shape == (classes, 16)
    assert torch.equal(model.classifier.weight, trained.classifier.weight) == (classes == 3)
    assert torch.equal(model.bert.pooler.dense.weight, trained.bert.pooler.dense.weight)
    again = load(folder, "classification", classes)
    assert torch.equal(model.classifier.weight, again.classifier.weight), "the seed decides"


def test_an_encoder_with_a_decoder_completes_nothing(architecture: Any) -> None:
    for name in ("bart", "t5"):
        assert f"{name} is an encoder with a decoder, expected a causal model" in refusal(architecture(name))


def test_a_plain_classifier_of_transformers_has_the_same_backbone(architecture: Any) -> None:
    model = load(architecture("gemma3"), "classification", 3)
    plain = AutoModelForSequenceClassification.from_pretrained(architecture("gemma3"), num_labels=3)
    for name, tensor in plain.named_parameters():
        if not name.startswith("score"):
            assert torch.equal(model.get_parameter(name), tensor), name
