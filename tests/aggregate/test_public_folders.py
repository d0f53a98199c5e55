"""Adapter folders as tools write them: each gives the right mean in PEFT, or is refused for a stated reason.

Every folder here is made from one adapter, so the right result is known: the mean with another, plain adapter.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

from adapter_folders import (
    CONFIG,
    FILE,
    LAYERS,
    adapted,
    classifier,
    distance_from_sum,
    edit_config,
    rename,
    rewrite,
    save,
)
from command import fedelta
from fedelta.aggregate.step import aggregate_folders
from fedelta.errors import FedeltaError

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def saved(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters as the installed PEFT saves them."""
    folder = tmp_path_factory.mktemp("saved")
    return [save(folder / "original", tiny_bert, 0), save(folder / "other", tiny_bert, 1, r=2)]


# Fields that each version of PEFT wrote for a plain LoRA adapter.
OLD_FIELDS: dict[str, dict[str, Any]] = {
    "0.5": {
        "auto_mapping": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "revision": None,
        "task_type": "SEQ_CLS",
    },
    "0.10": {
        "alpha_pattern": {},
        "auto_mapping": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_dropout": 0.1,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": ["classifier", "score"],
        "peft_type": "LORA",
        "rank_pattern": {},
        "revision": None,
        "task_type": "SEQ_CLS",
        "use_dora": False,
        "use_rslora": False,
    },
    "later": {"quantum_group_size": 16, "quantum_config": None, "use_quantum": False, "peft_version": "9.0.0"},
}
KEPT_FIELDS = ("base_model_name_or_path", "r", "lora_alpha", "target_modules")


def by_version(version: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        kept = config if version == "later" else {key: config[key] for key in KEPT_FIELDS}
        (folder / CONFIG).write_text(json.dumps(kept | OLD_FIELDS[version]))

    return change


def renamed(change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        rename(folder, change)

    return apply


def config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        edit_config(folder, **changes)

    return apply


def with_bom(folder: Path) -> None:
    file = folder / CONFIG
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


def sharded(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / FILE)
    (folder / FILE).unlink()
    names = sorted(tensors)
    index = {}
    for i, part in enumerate((names[:5], names[5:]), 1):
        file = f"adapter_model-{i:05}-of-00002.safetensors"
        safetensors.torch.save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def full_state(folder: Path) -> None:
    """Names of a whole PEFT model's state: with the adapter's name, `modules_to_save` and the base's own head."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = {}
        for key, tensor in tensors.items():
            if "lora_" in key:
                result[key.replace(".weight", ".default.weight")] = tensor
            else:
                module, parameter = key.rsplit(".", 1)
                result[f"{module}.modules_to_save.default.{parameter}"] = tensor
                result[f"{module}.original_module.{parameter}"] = torch.zeros_like(tensor)
        return result

    rewrite(folder, change)


def inside(name: str) -> Callable[[Path], None]:
    """Move the adapter into a subfolder, with other files beside it, as Trainer and PEFT's named adapters do."""

    def change(folder: Path) -> None:
        moved = folder.with_name("moved")
        folder.rename(moved)
        folder.mkdir()
        moved.rename(folder / name)
        (folder / "trainer_state.json").write_text("{}")
        (folder / "runs").mkdir()

    return change


RIGHT: dict[str, tuple[Callable[[Path], None], str]] = {
    "PEFT 0.5": (by_version("0.5"), ""),
    "PEFT 0.10": (by_version("0.10"), ""),
    "a later PEFT": (by_version("later"), "ignored, as PEFT does: quantum_group_size"),
    "DDP": (renamed(lambda key: f"module.{key}"), r"module. (DDP) removed"),
    "DDP inside": (renamed(lambda key: key.replace(PREFIX, f"{PREFIX}module.")), r"module. (DDP) removed"),
    "torch.compile": (renamed(lambda key: f"_orig_mod.{key}"), "_orig_mod (torch.compile) removed"),
    "axolotl with compile": (renamed(lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod.")), "_orig_mod"),
    "compiled layers": (renamed(lambda key: key.replace("layer.1.", "layer.1._orig_mod.")), "_orig_mod"),
    "FSDP": (renamed(lambda key: key.replace("layer.", "_fsdp_wrapped_module.layer.")), "_fsdp_wrapped_module (FSDP)"),
    "checkpointing": (
        renamed(lambda key: key.replace(".attention", "._checkpoint_wrapped_module.attention")),
        "_check",
    ),
    "doubled prefix": (renamed(lambda key: PREFIX + key), "a repeated base_model.model. removed"),
    "no prefix": (renamed(lambda key: key.removeprefix(PREFIX)), "base_model.model. added to all names"),
    "another adapter's name": (renamed(lambda key: key.replace("lora_A", "lora_A.team")), ""),
    "whole state": (full_state, "the adapter's name 'default' removed"),
    "bf16": (lambda p: rewrite(p, lambda tensors: {k: t.bfloat16() for k, t in tensors.items()}) and None, ""),
    "shards": (sharded, ""),
    "BOM": (with_bom, ""),
    "Trainer": (inside("checkpoint-500"), "its subfolder checkpoint-500 is the adapter"),
    "a named adapter": (inside("default"), "its subfolder default is the adapter"),
    "eva": (config(init_lora_weights="eva", eva_config={"rho": 2.0}), ""),
    "unsloth": (
        config(
            auto_mapping={"base_model_class": "Bert", "parent_library": "transformers.models", "unsloth_fixed": True}
        ),
        "",
    ),
    "axolotl": (config(lora_dropout=0.05, peft_version="0.18.0", exclude_modules=None, qalora_group_size=16), ""),
    "not finite fields": (config(lora_dropout=float("nan"), eva_config={"tau": float("inf")}), ""),
    "odd task": (config(task_type="POETRY"), ""),
}


@pytest.mark.parametrize("case", RIGHT)
def test_a_folder_as_a_tool_writes_it_has_the_right_mean(
    case: str, saved: list[Path], tiny_bert: Path, tmp_path: Path
) -> None:
    change, note = RIGHT[case]
    original, other, given = tmp_path / "original", saved[1], tmp_path / "given"
    shutil.copytree(saved[0], original)
    if case == "bf16":
        change(original)
    shutil.copytree(original, given)
    if case == "another adapter's name":
        rename(given, lambda key: key.replace("lora_B", "lora_B.team").replace("lora_A", "lora_A.team"))
    else:
        change(given)
    done = aggregate_folders([given, other], tmp_path / "out")
    assert (
        distance_from_sum(lambda: classifier(tiny_bert), [original, other], [1 / 2, 1 / 2], tmp_path / "out") < 1.5e-6
    )
    assert note in "\n".join(done.notes)
    json.loads((tmp_path / "out" / CONFIG).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_state_of_a_compiled_model_and_of_a_wrapped_one_is_read(tiny_bert: Path, tmp_path: Path) -> None:
    """These are names that PyTorch itself gives."""
    model = adapted(classifier(tiny_bert), 3, task_type="SEQ_CLS", target_modules=LAYERS)
    model.save_pretrained(tmp_path / "plain")
    for name, wrapped in {"compiled": torch.compile(model), "parallel": torch.nn.DataParallel(model)}.items():
        folder = tmp_path / name
        shutil.copytree(tmp_path / "plain", folder)
        state = {key: tensor for key, tensor in wrapped.state_dict().items() if "lora_" in key or "modules_to" in key}
        assert not set(state) & set(safetensors.torch.load_file(folder / FILE))
        safetensors.torch.save_file(state, folder / FILE)
        aggregate_folders([folder], tmp_path / f"{name}-out")
        assert (
            distance_from_sum(lambda: classifier(tiny_bert), [tmp_path / "plain"], [1], tmp_path / f"{name}-out")
            < 1.5e-6
        )


def test_trained_embeddings_that_peft_saves_whole_are_averaged(tiny_bert: Path, tmp_path: Path) -> None:
    paths = []
    for i in range(2):
        model = adapted(classifier(tiny_bert), i, task_type="SEQ_CLS", target_modules=["query", "word_embeddings"])
        with torch.no_grad():
            embedding = model.get_base_model().get_input_embeddings().base_layer
            embedding.weight += 0.1 * torch.randn(embedding.weight.shape, generator=torch.Generator().manual_seed(i))
        model.save_pretrained(tmp_path / str(i), save_embedding_layers=True)
        paths.append(tmp_path / str(i))
    assert any("base_layer" in key for key in safetensors.torch.load_file(paths[0] / FILE))
    aggregate_folders(paths, tmp_path / "out")
    assert distance_from_sum(lambda: classifier(tiny_bert), paths, [1 / 2, 1 / 2], tmp_path / "out") < 1.5e-6


def pointer(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n")

    return change


def tensor(key_part: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        rewrite(folder, lambda tensors: {k: value(t) if key_part in k else t for k, t in tensors.items()})

    return change


def extra(key: str, value: torch.Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        rewrite(folder, lambda tensors: {**tensors, key: value})

    return change


def only(*names: str) -> Callable[[Path], None]:
    """Leave files of these names, with the content `{}`."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")

    return change


def two_checkpoints(folder: Path) -> None:
    inside("checkpoint-500")(folder)
    shutil.copytree(folder / "checkpoint-500", folder / "checkpoint-1000")


def collision(folder: Path) -> None:
    rewrite(folder, lambda tensors: {**tensors, **{f"_orig_mod.{key}": tensor for key, tensor in tensors.items()}})


def header(content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / FILE).write_bytes(len(content).to_bytes(8, "little") + content)

    return change


def raw_config(content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / CONFIG).write_bytes(content)

    return change


def loop(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder)


QUERY = f"{PREFIX}bert.encoder.layer.0.attention.self.query"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "LFS pointer": (pointer(FILE), f"{FILE} is a pointer of Git LFS, not the file itself; run `git lfs pull`"),
    "LFS pointer of the configuration": (pointer(CONFIG), f"{CONFIG} is a pointer of Git LFS"),
    "two checkpoints": (
        two_checkpoints,
        "adapters in its subfolders checkpoint-1000, checkpoint-500: name one of them",
    ),
    "merged model": (only("config.json", "model.safetensors"), "a whole model, not an adapter"),
    "empty folder": (only(), "the folder is empty"),
    "FSDP shards": (only("__0_0.distcp"), "a sharded training checkpoint"),
    "only weights": (only(FILE), f"it has {FILE} only; both files are needed"),
    "a missing shard": (
        lambda p: sharded(p) or (p / "adapter_model-00002-of-00002.safetensors").unlink(),
        "is missing",
    ),
    "symlink loop": (loop, "a link that leads nowhere"),
    "pickle named safetensors": (
        lambda p: torch.save({"a": torch.ones(1)}, p / FILE),
        "is a pickle, which can run code",
    ),
    "empty file": (lambda p: (p / FILE).write_bytes(b"") and None, f"{FILE} is empty"),
    "DeepSpeed": (tensor("lora_A", lambda t: t[:0, 0]), "is empty, (0,): saved without gathering the shards"),
    "flat shards": (tensor("lora_A", torch.flatten), "expected a matrix; shards of FSDP must be gathered"),
    "float8": (tensor("lora_", lambda t: t.to(torch.float8_e4m3fn)), "is F8_E4M3, expected one of F64, F32, F16, BF16"),
    "int8": (tensor("lora_B", lambda t: t.to(torch.int8)), "is I8, expected one of"),
    "complex": (tensor("lora_B", lambda t: t.to(torch.complex64)), "is C64, expected one of"),
    "bool head": (tensor("classifier.bias", lambda t: t > 0), "head classifier.bias is BOOL"),
    "two adapters": (
        lambda p: rename(p, lambda k: k.replace("lora_A", "lora_A.a" if "layer.0" in k else "lora_A.b")) and None,
        "the file holds the adapters a, b, expected one",
    ),
    "collision": (collision, "are the same one"),
    "DoRA": (extra(f"{QUERY}.lora_magnitude_vector", torch.ones(24)), "DoRA's magnitude, so the update is not s·B·A"),
    "quantized base": (extra(f"{QUERY}.base_layer.weight.absmax", torch.ones(3)), "belongs to quantized weights"),
    "trained tokens": (extra(f"{PREFIX}embed.token_adapter.delta", torch.ones(3)), "is not supported"),
    "diffusers": (renamed(lambda key: key.replace("lora_A.weight", "lora.down.weight")), "has no lora_A"),
    "kohya": (
        lambda p: rewrite(p, lambda _: {"lora_unet_q.lora_down.weight": torch.ones(2, 2)}) and None,
        "no LoRA weights in PEFT's layout|is not supported",
    ),
    "a name with control characters": (
        renamed(lambda key: key.replace("query", "qu\x1b[31mery")),
        "is not the name of",
    ),
    "a very long name": (
        renamed(lambda key: key.replace("query", "q" * 5000)),
        "is not the name of a module's parameter",
    ),
    "header that lies": (header(b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}'), FILE),
    "header that is not JSON": (header(b"x" * 64), FILE),
    "nested JSON": (raw_config(b"[" * 100_000), "is nested too deeply"),
    "not JSON": (raw_config(b"{'r': 8}"), "is not JSON"),
    "binary": (raw_config(b"\xff\xfe\x00"), "is not JSON"),
    "huge rank": (config(r=10**9), "r is 1000000000, expected a whole number from 1 to 65536"),
    "rank 0": (config(r=0), "r is 0, expected a whole number"),
    "rank is text": (config(r="8"), "r is '8', expected a whole number"),
    "rank is not in the file": (config(r=5), "has rank 3, but adapter_config.json says 5"),
    "α is text": (config(lora_alpha="16"), "lora_alpha is '16', expected a positive number"),
    "α is null": (config(lora_alpha=None), "lora_alpha is None, expected a positive number"),
    "α is NaN": (config(lora_alpha=float("nan")), "lora_alpha is nan, expected a positive number"),
    "a flag is text": (config(use_rslora="false"), "use_rslora is 'false', expected true or false"),
    "a pattern that does not end": (config(alpha_pattern={"(a+)+b": 3}), "repeats too much to be matched safely"),
    "a pattern that is no expression": (config(alpha_pattern={"[": 3}), "not a regular expression"),
    "pissa": (config(init_lora_weights="pissa_niter_4"), "moves a part of the base weight into the adapter"),
    "unknown initialization": (config(init_lora_weights="quantum"), "is not known here and may change the base weight"),
    "unknown feature": (config(use_quantum=True), "'use_quantum' is not known here and may change what the adapter"),
    "trained biases": (config(bias="lora_only"), "bias='lora_only' is not supported: it trains biases"),
    "MLX": (config(peft_type=..., fine_tune_type="lora"), "a adapter without peft_type adapter, expected LORA"),
    "another kind": (config(peft_type="ADALORA"), "a ADALORA adapter, expected LORA"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_has_no_mean_is_refused_in_one_line(case: str, saved: list[Path], tmp_path: Path) -> None:
    change, reason = REFUSED[case]
    given, other = tmp_path / "given", saved[1]
    shutil.copytree(saved[0], given)
    change(given)
    with pytest.raises(FedeltaError) as refused:
        aggregate_folders([other, given], tmp_path / "out")
    line = str(refused.value)
    assert any(each in line for each in reason.split("|")), line
    assert str(given) in line
    assert "\n" not in line
    assert len(line.replace(str(tmp_path), "")) < 280
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_every_field_of_peft_has_a_class() -> None:
    """A new version of PEFT makes this fail until its new fields are kept, reset or refused."""
    from dataclasses import fields

    from fedelta.lora.files.adapter_config import KEPT, REFUSED, RESET

    classified = [*KEPT, *RESET, *REFUSED]
    assert len(classified) == len(set(classified))
    assert {field.name for field in fields(peft.LoraConfig)} <= set(classified)


@pytest.mark.parametrize("name", ["owner/no-such-adapter", "owner/no-such-adapter@v1", "a/b/c", "data/x"])
def test_a_name_that_is_no_folder_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "data").mkdir()
    assert fedelta("aggregate", name, "-o", "out") == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {name}: no such folder")
    assert ("Hub" in line) == name.startswith("owner/")
    assert line.count("\n") == 1


def test_an_adapter_in_the_hubs_cache_is_found_by_its_name(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "cache" / "models--owner--adapter"
    (cached / "snapshots").mkdir(parents=True)
    save(cached / "snapshots" / "abc123", tiny_bert)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc123")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    done = aggregate_folders(["owner/adapter"], tmp_path / "out")
    assert done.clients == [("owner/adapter", 1.0)]
