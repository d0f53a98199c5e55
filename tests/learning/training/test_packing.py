"""Training on packed texts gives the loss and the gradients of padded ones."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from architectures import DECODERS, SMALL
from causal import ARCHITECTURES, build_tokenizer
from comparisons import distance, exported_products, max_distance
from fedelta.errors import FedeltaError
from fedelta.federation.engines.measure import fastest_stack
from fedelta.learning.data import Examples
from fedelta.learning.data.examples import IGNORED
from fedelta.learning.model.checkpointing import enable_checkpointing
from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.learning.training import TrainingSettings, train
from fedelta.learning.training.packing import check_packing, pack, packed_batch
from fedelta.learning.training.stopwatch import Stopwatch
from fedelta.lora.adapter import Adapter, LoraPair, initial_adapter
from fedelta.runs.assemble import prepare, tokenized_splits
from fedelta.runs.runner import run

CPU = torch.device("cpu")
WINDOW = 16
# Longer and shorter than the sliding windows, so that rows hold one and three texts, with padding and without.
LENGTHS = (40, 20, 18, 2, 30, 7, 5, 3)
WITHOUT = {name: value for name, value in SMALL.items() if name not in ("intermediate_size", "num_key_value_heads")}
EXACT: dict[str, Any] = {
    **{name: DECODERS[name] for name in ("llama", "qwen3", "gemma3-text", "gemma3", "gpt2", "mixtral")},
    "mistral": ARCHITECTURES["mistral"],
    "gemma2": ARCHITECTURES["gemma2"],
    "qwen2": transformers.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "phi3": transformers.Phi3Config(**SMALL, sliding_window=WINDOW),
    "gpt-neox": transformers.GPTNeoXConfig(**WITHOUT, intermediate_size=32),
}
REFUSED: dict[str, Any] = {
    "opt": DECODERS["opt"],
    "falcon": transformers.FalconConfig(**WITHOUT),
    "falcon with ALiBi": transformers.FalconConfig(**WITHOUT, alibi=True),
    "bloom": transformers.BloomConfig(**WITHOUT, n_layer=2, n_head=2),
    "mamba": transformers.MambaConfig(**WITHOUT, state_size=4),
}


def new_model(config: Any, attention: str | None = None, targets: str = "all-linear") -> LoraModel:
    """A model with random weights and a random adapter of rank 3."""
    torch.manual_seed(0)
    kind = transformers.Gemma3ForConditionalGeneration if config.model_type == "gemma3" else AutoModelForCausalLM
    from_config = kind._from_config if config.model_type == "gemma3" else kind.from_config
    model = LoraModel(from_config(config, attn_implementation=attention), LoraSettings(target_modules=targets))
    start = initial_adapter(model.shapes, 3, 0)
    model.load(Adapter({m: LoraPair(p.A, 0.1 * torch.randn(p.B.shape), 1.0) for m, p in start.items()}), {})
    return model


def texts(lengths: Any = LENGTHS) -> Examples:
    """Random tokens. The first third of each text is the prompt."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(8, SMALL["vocab_size"], (length,), generator=generator).tolist() for length in lengths]
    labels = [[*[IGNORED] * (len(row) // 3), *row[len(row) // 3 :]] for row in rows]
    return Examples([{"input_ids": row} for row in rows], labels)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_each_text_is_in_one_row_and_no_row_is_longer_than_the_longest_text(lengths: list[int]) -> None:
    rows = pack(range(len(lengths)), lengths.__getitem__)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    filled = sorted(sum(lengths[text] for text in row) for row in rows)
    assert filled[-1] == max(lengths)
    # A text gets a new row only if it fits into none.
    assert len(filled) == 1 or filled[0] + filled[1] > filled[-1]


def test_the_order_in_which_texts_come_does_not_change_the_rows() -> None:
    lengths = [9, 4, 6, 3, 3, 9]
    assert pack(range(6), lengths.__getitem__) == pack([4, 2, 0, 5, 1, 3], lengths.__getitem__)


def gradients(model: LoraModel, batch: dict[str, Any]) -> tuple[float, list[torch.Tensor]]:
    loss = model.peft(**batch).loss
    return float(loss.detach()), list(torch.autograd.grad(loss, model.parameters))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", EXACT)
def test_loss_and_gradients_equal_those_of_padded_texts(name: str, attention: str) -> None:
    if (name, attention) == ("gemma2", "sdpa"):
        attention = "eager"  # It has no other.
    targets = "all-linear" if name != "gemma3" else r".*language_model.*_proj"
    model, tokenizer, examples = new_model(EXACT[name], attention, targets), build_tokenizer(), texts()
    check_packing(model, tokenizer)
    model.peft.train()
    rows = pack(range(len(examples)), examples.length)
    assert sorted(map(len, rows)) == [1, 1, 3, 3]
    packed = packed_batch(examples, rows, tokenizer, CPU)
    padded = examples.batch(range(len(examples)), tokenizer)
    if name == "gemma3":
        # Older versions of transformers ask in training which tokens are images.
        for batch in (packed, padded):
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    assert packed["input_ids"].numel() == 0.5 * padded["input_ids"].numel()
    (loss, own), (expected_loss, expected) = gradients(model, packed), gradients(model, padded)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for gradient, other in zip(own, expected, strict=True):
        assert float(other.norm()) > 0
        assert distance(gradient, other) < 1e-5


def test_loss_and_gradients_are_equal_with_checkpointing() -> None:
    model, tokenizer, examples = new_model(EXACT["llama"]), build_tokenizer(), texts()
    enable_checkpointing(model.peft.get_base_model())
    model.peft.enable_input_require_grads()
    model.peft.train()
    packed = packed_batch(examples, pack(range(len(examples)), examples.length), tokenizer, CPU)
    (loss, own), (expected_loss, expected) = (
        gradients(model, batch) for batch in (packed, examples.batch(range(len(examples)), tokenizer))
    )
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert all(distance(gradient, other) < 1e-5 for gradient, other in zip(own, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_packed_texts_see_each_other_is_refused_in_one_line(name: str, dtype: torch.dtype) -> None:
    model = new_model(REFUSED[name], targets="all-linear" if name != "mamba" else r".*in_proj")
    model.peft.to(dtype)
    model.peft.train()
    for _ in range(2):
        with pytest.raises(FedeltaError, match=r"^training\.packing is true, but a \w+ model can't train on") as raised:
            check_packing(model, build_tokenizer())
        reason = "one text of a row to the next" if name == "mamba" else "depend on the text before it in its row"
        assert reason in str(raised.value)
        assert "\n" not in str(raised.value)
    assert model.peft.training


@pytest.mark.parametrize("name", EXACT)
def test_rounding_to_bfloat16_is_not_a_reason_to_refuse(name: str) -> None:
    model = new_model(EXACT[name])
    model.peft.to(torch.bfloat16)
    check_packing(model, build_tokenizer())


@pytest.mark.parametrize("deviation", [0.2, 0.02])
def test_a_leak_that_is_smaller_than_rounding_is_noticed(deviation: float) -> None:
    """With small weights, the logits of Bloom in bfloat16 change by some percent, as by rounding."""
    config = transformers.BloomConfig(**WITHOUT | {"n_layer": 2, "n_head": 2, "initializer_range": deviation})
    model = new_model(config)
    model.peft.to(torch.bfloat16)
    with pytest.raises(FedeltaError, match="depend on the text before it in its row"):
        check_packing(model, build_tokenizer())


def test_a_model_whose_forward_pass_fails_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model(EXACT["llama"])

    def forward(*_: Any, **__: Any) -> None:
        raise TypeError("no position_ids,\nplease")

    monkeypatch.setattr(model.peft, "forward", forward)
    with pytest.raises(FedeltaError, match="can't train on packed texts: no position_ids, please"):
        check_packing(model, build_tokenizer())


@pytest.mark.parametrize(
    "passes", [{}, {"micro_batches": False}, {"micro_batch_size": 1}, {"micro_batches": False, "micro_batch_size": 2}]
)
def test_training_on_packed_texts_equals_training_on_padded_ones(passes: dict[str, Any]) -> None:
    """Twenty steps with clipping, in fewer tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = [40 if i % 5 == 0 else 3 + i % 9 for i in torch.randperm(40, generator=generator).tolist()]
    examples, results = texts(lengths), []
    for packing in (False, True):
        model, watch = new_model(EXACT["llama"]), Stopwatch()
        settings = TrainingSettings(steps=20, batch_size=8, learning_rate=1e-3, packing=packing, **passes)
        loss = train(model, build_tokenizer(), examples, settings, 1, watch=watch)
        results.append((loss, model.read(), watch.counts))
    (loss, adapter, counts), (packed_loss, packed, packed_counts) = results
    assert packed_loss == pytest.approx(loss, rel=1e-4)
    for module, pair in adapter.items():
        assert distance(packed[module].A, pair.A) < 1e-4
        assert distance(packed[module].B, pair.B) < 1e-4
    own, other = dict(packed_counts), dict(counts)
    padding, other_padding = own.pop("padded_tokens"), other.pop("padded_tokens")
    assert own == other
    assert own["tokens"] <= padding <= other_padding
    if passes.get("micro_batch_size") != 1:
        assert padding < other_padding


def test_dropout_on_packed_texts_depends_on_the_seed_alone() -> None:
    model = LoraModel(
        AutoModelForCausalLM.from_config(EXACT["llama"]), LoraSettings(target_modules="all-linear", dropout=0.3)
    )
    start = initial_adapter(model.shapes, 3, 0)
    results = []
    for seed in (1, 1, 2):
        model.load(start, {})
        train(model, build_tokenizer(), texts(), TrainingSettings(steps=3, batch_size=4, packing=True), seed)
        results.append(model.read())
    one, again, other = ([pair.B for pair in adapter.values()] for adapter in results)
    assert all(map(torch.equal, one, again))
    assert not any(map(torch.equal, one, other))


def test_a_run_on_packed_texts_equals_one_on_padded_texts(causal_config: Any) -> None:
    """Only the last layer has an adapter, so that a run keeps activations of what is below."""
    runs = []
    for packing in (False, True):
        config = causal_config(
            name=f"packing-{packing}",
            lora={"alpha": 8, "target_modules": r".*layers\.1\..*_proj"},
            training={"batch_size": 8, "learning_rate": 0.02, "packing": packing},
        )
        trainer, _ = prepare(config)
        assert trainer.activation_cache is not None
        runs.append(run(config))
    padded, packed = runs
    assert max_distance(exported_products(packed), exported_products(padded)) < 1e-4
    assert packed.result["test"]["loss"] == pytest.approx(padded.result["test"]["loss"], rel=1e-4)


def test_auto_trains_clients_with_packed_texts_one_by_one(causal_config: Any) -> None:
    config = causal_config(training={"batch_size": 8, "packing": True, "stack": "auto"})
    trainer, _ = prepare(config)
    assert fastest_stack(trainer, tokenized_splits(config)[0].train, [2, 4]) == 1


def test_packed_clients_cannot_be_stacked(causal_config: Any) -> None:
    with pytest.raises(FedeltaError, match="training: packing: true needs stack: 1 or stack: auto, found stack: 3"):
        causal_config(training={"packing": True, "stack": 3})


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_only_language_models_train_on_packed_texts(task: str, tiny_config: Any) -> None:
    reason = f"training.packing: true needs a language model, expected task: completion, found {task}"
    with pytest.raises(FedeltaError, match=reason):
        tiny_config(task=task, training={"packing": True})


def test_a_run_with_a_model_that_cannot_pack_ends_before_it_writes(architecture: Any, causal_config: Any) -> None:
    config = causal_config(model={"name": str(architecture("opt"))}, training={"packing": True})
    with pytest.raises(FedeltaError, match="but a opt model can't train on packed texts"):
        run(config)
    assert not Path(config.output).exists()
