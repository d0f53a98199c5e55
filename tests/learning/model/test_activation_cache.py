"""The cache of activations below the lowest adapter changes neither training nor scores."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from fedelta.federation.engines.activation_caches import ActivationCaches
from fedelta.federation.engines.workers import Workers
from fedelta.learning.data import Examples
from fedelta.learning.model.activation_cache import find_activation_cache
from fedelta.learning.model.base_model import ModelSettings, load_base
from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.learning.tasks import Classification, Unit, evaluate
from fedelta.learning.training import TrainingSettings, train
from fedelta.lora.adapter import initial_adapter
from fedelta.runs.runner import Run, run

TOP = {"bert": r".*layer\.1\..*(query|value)", "gpt2": r".*h\.1\..*(c_attn|c_proj)"}


def calm(folder: Path, target: Path) -> Path:
    """A copy of a model without dropout."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config |= {name: 0.0 for name in config if "dropout" in name or name.endswith("pdrop")}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture
def folders(tiny_bert: Path, tiny_gpt2: Path, tmp_path: Path) -> dict[str, Path]:
    return {"bert": calm(tiny_bert, tmp_path / "calm-bert"), "gpt2": calm(tiny_gpt2, tmp_path / "calm-gpt2")}


def lora_model(folder: Path, **settings: Any) -> tuple[LoraModel, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LoraModel(load_base(ModelSettings(name=str(folder)), 3, tokenizer, seed=1), LoraSettings(**settings))
    model.load(initial_adapter(model.shapes, 3, 0).with_scale(2.0), model.head_tensors())
    return model, tokenizer


def texts(count: int = 30) -> Examples:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 30, (count,), generator=generator).tolist()
    rows = [torch.randint(4, 40, (length,), generator=generator).tolist() for length in lengths]
    return Examples([{"input_ids": row} for row in rows], [i % 3 for i in range(count)])


def passes_of_the_first_layer(model: LoraModel, seen: list[int]) -> None:
    """Append to `seen` the number of rows in each pass of the lowest layer."""
    name = "bert.encoder.layer.0.output" if hasattr(model.peft.get_base_model(), "bert") else "transformer.h.0.mlp"
    module = model.peft.get_base_model().get_submodule(name)
    module.register_forward_hook(lambda _m, _x, output: seen.append(len(output)))


@pytest.mark.parametrize("kind", sorted(TOP))
def test_training_and_scores_are_the_same_with_a_cache(kind: str, folders: dict[str, Path]) -> None:
    examples, settings = texts(), TrainingSettings(steps=8, batch_size=8, learning_rate=0.01)
    results = []
    for cached in (False, True):
        model, tokenizer = lora_model(folders[kind], target_modules=TOP[kind], dropout=0.1)
        cache = find_activation_cache(model, tokenizer)
        assert cache
        assert not cache.drops_out
        if cached:
            cache.fill(examples)
        seen: list[int] = []
        passes_of_the_first_layer(model, seen)
        loss = train(model, tokenizer, examples, settings, seed=3, cache=cache)
        assert bool(seen) is not cached
        results.append(
            (loss, model.read(), model.head_tensors(), evaluate(Classification(), model, tokenizer, examples, 8))
        )
    (plain_loss, plain, plain_heads, plain_scores), (loss, adapter, heads, scores) = results
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert scores["loss"] == pytest.approx(plain_scores["loss"], rel=1e-5)
    for module, pair in plain.items():
        for tensor, expected in ((adapter[module].A, pair.A), (adapter[module].B, pair.B)):
            assert float((tensor - expected).norm() / expected.norm()) < 1e-5
    for name, tensor in plain_heads.items():
        torch.testing.assert_close(heads[name], tensor, rtol=1e-4, atol=1e-6)


def test_with_dropout_in_the_frozen_layers_the_cache_serves_evaluation_only(tiny_bert: Path) -> None:
    model, tokenizer = lora_model(tiny_bert, target_modules=TOP["bert"])
    cache = find_activation_cache(model, tokenizer)
    assert cache
    assert cache.drops_out
    examples = texts()
    cache.fill(examples)
    seen: list[int] = []
    passes_of_the_first_layer(model, seen)
    train(model, tokenizer, examples, TrainingSettings(steps=1, batch_size=8), seed=3, cache=cache)
    assert sum(seen) == 8
    # Evaluation has no dropout, so it skips the frozen layers.
    seen.clear()
    for rows in examples.evaluation_order(8):
        outcomes = [
            Classification().evaluate_batch(model, tokenizer, examples, Unit("forward", rows), using)
            for using in (cache, None)
        ]
        cached, plain = ([outcome[0] for outcome in batch] for batch in outcomes)
        assert cached == pytest.approx(plain, rel=1e-5)
    assert sum(seen) == len(examples), "only the passes without a cache run the first layer"


def test_replay_restores_the_model(folders: dict[str, Path]) -> None:
    model, tokenizer = lora_model(folders["bert"], target_modules=TOP["bert"])
    examples = texts()
    before = evaluate(Classification(), model, tokenizer, examples, 8)
    replaced = {name for name, module in model.peft.named_modules() if "forward" in vars(module)}
    cache = find_activation_cache(model, tokenizer)
    assert cache
    cache.fill(examples)
    with pytest.raises(RuntimeError), cache.replay(examples, [0], examples.batch([0], tokenizer)):
        raise RuntimeError
    assert {name for name, module in model.peft.named_modules() if "forward" in vars(module)} == replaced
    assert evaluate(Classification(), model, tokenizer, examples, 8) == before


@pytest.mark.parametrize(
    "settings", [{}, {"target_modules": "all-linear"}, {"target_modules": TOP["bert"], "modules_to_save": ("pooler",)}]
)
def test_there_is_no_cache_if_a_module_below_may_train(settings: dict[str, Any], tiny_bert: Path) -> None:
    model, tokenizer = lora_model(tiny_bert, **settings)
    assert find_activation_cache(model, tokenizer) is None


def other_model(kind: str, adapted: str, **options: Any) -> LoraModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, hidden_size=24, num_attention_heads=2, vocab_size=60, num_labels=3, pad_token_id=0, **options
    )
    base = AutoModelForSequenceClassification.from_config(config)
    return LoraModel(base, LoraSettings(target_modules=adapted))


@pytest.mark.parametrize(("rate", "skipped", "random"), [(0.1, 0.0, True), (0.0, 0.1, True), (0.0, 0.0, False)])
def test_dropout_and_layer_drop_are_detected(rate: float, skipped: float, random: bool, tiny_bert: Path) -> None:
    """OPT has no dropout modules, only rates as plain numbers."""
    options = {"num_hidden_layers": 2, "ffn_dim": 40, "word_embed_proj_dim": 24, "max_position_embeddings": 40}
    model = other_model("opt", r".*layers\.1\..*q_proj", **options, dropout=rate, layerdrop=skipped)
    cache = find_activation_cache(model, AutoTokenizer.from_pretrained(tiny_bert))
    assert cache
    assert cache.drops_out is random


def test_dropout_above_the_frozen_layers_does_not_count(tiny_bert: Path) -> None:
    options = {"dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 40, "dropout": 0.0, "attention_dropout": 0.0}
    torch.manual_seed(0)
    config = AutoConfig.for_model("distilbert", vocab_size=60, num_labels=3, **options)
    assert config.seq_classif_dropout > 0
    base = AutoModelForSequenceClassification.from_config(config)
    model = LoraModel(base, LoraSettings(target_modules=r".*layer\.1\..*q_lin"))
    cache = find_activation_cache(model, AutoTokenizer.from_pretrained(tiny_bert))
    assert cache
    assert not cache.drops_out


def test_there_is_no_cache_if_layers_run_more_than_once(tiny_bert: Path) -> None:
    options = {"embedding_size": 24, "num_hidden_layers": 4, "num_hidden_groups": 2, "intermediate_size": 40}
    model = other_model("albert", r".*groups\.1\..*query", **options, initializer_range=0.5)
    assert find_activation_cache(model, AutoTokenizer.from_pretrained(tiny_bert)) is None


def test_there_is_no_cache_if_positions_depend_on_padding(tiny_gpt2: Path) -> None:
    model, tokenizer = lora_model(tiny_gpt2, target_modules=TOP["gpt2"])
    tokenizer.padding_side = "left"
    assert find_activation_cache(model, tokenizer) is None


def test_the_memory_budget_is_spent_in_a_fixed_order(folders: dict[str, Path]) -> None:
    model, tokenizer = lora_model(folders["bert"], target_modules=TOP["bert"])
    cache = find_activation_cache(model, tokenizer)
    assert cache
    sizes = {name: texts(count) for name, count in (("b", 10), ("a", 20), ("c", 5))}
    shards: Any = {name: type("Rows", (), {"train": examples}) for name, examples in sizes.items()}
    validation = texts(7)

    def chosen(max_bytes: float) -> set[Examples]:
        return ActivationCaches(cache, Workers(1), validation, shards, max_bytes).chosen

    everything = sum(cache.bytes_of(each) for each in [validation, *sizes.values()])
    assert chosen(everything) == {validation, *sizes.values()}
    assert chosen(everything - 1) == {validation, sizes["a"], sizes["b"]}
    assert chosen(cache.bytes_of(validation) + cache.bytes_of(sizes["b"])) == {validation, sizes["b"]}
    assert chosen(0) == set()
    # Only chosen sets are cached.
    small = ActivationCaches(cache, Workers(1), validation, shards, everything - 1)
    small.fill([sizes["b"], sizes["c"]])
    assert cache.keeps(sizes["b"])
    assert not cache.keeps(sizes["c"])
    assert not cache.keeps(validation)


@pytest.fixture
def top_config(tiny_config: Any, folders: dict[str, Path]) -> Any:
    def make(name: str, gigabytes: float = 1.0, **changes: Any) -> Any:
        model = {"name": str(folders["bert"]), "activation_cache": gigabytes}
        lora = {"alpha": 8, "target_modules": TOP["bert"]}
        return tiny_config(**{"name": name, "model": model, "lora": lora, "method": "fedex", **changes})

    return make


def adapter_of(finished: Run) -> dict[str, torch.Tensor]:
    return load_file(finished.folder.adapter_folder / "adapter_model.safetensors")


def test_a_run_with_a_cache_equals_a_run_without(top_config: Any) -> None:
    cached, plain = run(top_config("with")), run(top_config("without", 0.0))
    assert len(cached.records) == 3
    for record, expected in zip(cached.records, plain.records, strict=True):
        assert record["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)
        assert record["validation"]["loss"] == pytest.approx(expected["validation"]["loss"], rel=1e-4)
    timings = [json.loads(line) for line in cached.folder.timings_file.read_text().splitlines()]
    assert all(timing["seconds"]["activations"] > 0 for timing in timings)


def test_workers_and_a_resume_do_not_change_a_bit(top_config: Any) -> None:
    whole = run(top_config("whole", rounds=4))
    two = run(top_config("two", rounds=4, workers=2))
    run(top_config("parts", rounds=2))
    parts = run(top_config("parts", rounds=4), resume=True)
    for other in (two, parts):
        assert other.folder.rounds_file.read_bytes() == whole.folder.rounds_file.read_bytes()
        assert all(torch.equal(tensor, adapter_of(other)[name]) for name, tensor in adapter_of(whole).items())
