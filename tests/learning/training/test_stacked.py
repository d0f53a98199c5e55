"""Training several clients in one pass gives the same results as training each one alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from fedelta.learning.data import Examples
from fedelta.learning.model.base_model import ModelSettings, load_base
from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.learning.training import TrainingSettings, train
from fedelta.learning.training.stacked import StackedClient, reason_not_to_stack, train_stacked
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.lowrank import Dense


def lora_model(folder: Path, dropout: float, targets: tuple[str, ...]) -> tuple[LoraModel, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = load_base(ModelSettings(name=str(folder)), 3, tokenizer, seed=1)
    for name, module in base.named_modules():
        if isinstance(module, nn.Dropout):
            # Fused attention draws from one generator for all clients.
            module.p = 0.0 if "attention.self" in name or "attn_dropout" in name else dropout
    return LoraModel(base, LoraSettings(dropout=dropout, target_modules=targets)), tokenizer


def texts(count: int, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 30, (count,), generator=generator).tolist()
    rows = [torch.randint(4, 40, (length,), generator=generator).tolist() for length in lengths]
    return Examples([{"input_ids": row} for row in rows], [i % 3 for i in range(count)])


def client(model: LoraModel, rank: int, scale: float, rows: int, seed: int, **changes: Any) -> StackedClient:
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter(
        {
            module: LoraPair(
                0.2 * torch.randn(rank, n, generator=generator), 0.2 * torch.randn(m, rank, generator=generator), scale
            )
            for module, (m, n) in model.shapes.items()
        }
    )
    heads = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in model.head_tensors().items()}
    return StackedClient(adapter, heads, texts(rows, seed), seed, **changes)


def train_alone(model: LoraModel, tokenizer: Any, each: StackedClient, training: TrainingSettings) -> Any:
    model.load(each.adapter, each.heads, each.factors)
    loss = train(model, tokenizer, each.examples, training, each.seed, lambda: each.penalty(model.live()))
    return model.read(), model.head_tensors(), loss


def distance(tensor: torch.Tensor, expected: torch.Tensor) -> float:
    return float((tensor - expected).norm() / expected.norm().clamp(min=1e-12))


def check(model: LoraModel, tokenizer: Any, clients: list[StackedClient], training: TrainingSettings) -> None:
    """Assert that a stack trains each client as `train` does."""
    together = train_stacked(model, tokenizer, clients, training)
    for each, trained in zip(clients, together, strict=True):
        adapter, heads, loss = train_alone(model, tokenizer, each, training)
        assert trained.loss == pytest.approx(loss, rel=1e-5)
        assert trained.adapter.rank == each.adapter.rank
        for module, pair in adapter.items():
            assert trained.adapter[module].scale == pair.scale
            assert distance(trained.adapter[module].A, pair.A) < 1e-5
            assert distance(trained.adapter[module].B, pair.B) < 1e-5
        assert set(trained.heads) == set(heads)
        for name, tensor in heads.items():
            assert distance(trained.heads[name], tensor) < 1e-5


BERT = ("query", "intermediate.dense")


@settings(max_examples=12)
@given(st.data())
def test_a_stack_trains_each_client_as_it_would_alone(tiny_bert: Path, data: Any) -> None:
    """Mixed ranks and scales, clipping, schedules and dropout. Shards of unequal size make some clients stop early."""
    dropout = data.draw(st.sampled_from([0.0, 0.1]))
    model, tokenizer = lora_model(tiny_bert, dropout, BERT)
    clients = [
        client(
            model,
            data.draw(st.integers(1, 32)),
            data.draw(st.sampled_from([0.5, 1.0, 2.0])),
            data.draw(st.integers(1, 30)),
            seed,
        )
        for seed in range(data.draw(st.integers(1, 4)))
    ]
    training = TrainingSettings(
        epochs=2,
        batch_size=data.draw(st.sampled_from([2, 8])),
        learning_rate=1e-3,
        optimizer=data.draw(st.sampled_from(["adamw", "sgd"])),
        schedule=data.draw(st.sampled_from(["constant", "linear"])),
        warmup=0.2,
        weight_decay=0.1,
        max_grad_norm=data.draw(st.sampled_from([None, 0.05])),
        micro_batches=False,
    )
    check(model, tokenizer, clients, training)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_twenty_steps_of_an_encoder_equal_those_of_each_client_alone(tiny_bert: Path, dropout: float) -> None:
    model, tokenizer = lora_model(tiny_bert, dropout, BERT)
    clients = [client(model, rank, 2.0, 5 + 9 * i, i) for i, rank in enumerate((1, 4, 32))]
    check(model, tokenizer, clients, TrainingSettings(steps=20, batch_size=8, micro_batches=False))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_twenty_steps_of_a_model_with_conv1d_equal_those_of_each_client_alone(tiny_gpt2: Path, dropout: float) -> None:
    model, tokenizer = lora_model(tiny_gpt2, dropout, ("c_attn", "c_fc"))
    clients = [client(model, rank, 0.5, 6 + 5 * i, i) for i, rank in enumerate((2, 7))]
    check(model, tokenizer, clients, TrainingSettings(steps=20, batch_size=4, micro_batches=False))


def test_a_stack_supports_frozen_factors_penalties_and_patches(tiny_bert: Path) -> None:
    model, tokenizer = lora_model(tiny_bert, 0.0, BERT)
    model.patch.set({module: Dense(0.05 * torch.randn(shape)) for module, shape in model.shapes.items()})

    def penalty(adapter: Adapter) -> torch.Tensor:
        return 0.01 * sum((pair.B.square().sum() for pair in adapter.values()), torch.zeros(()))

    clients = [
        client(model, 3, 1.0, 9, 0, factors=frozenset({"B"})),
        client(model, 5, 2.0, 7, 1, factors=frozenset({"A"})),
        client(model, 2, 2.0, 12, 2, penalty=penalty),
    ]
    check(model, tokenizer, clients, TrainingSettings(steps=6, batch_size=4, micro_batches=False))
    trained = train_stacked(model, tokenizer, clients, TrainingSettings(steps=2, batch_size=4))
    for module, pair in clients[0].adapter.items():
        assert torch.equal(trained[0].adapter[module].A, pair.A)
        assert not torch.equal(trained[0].adapter[module].B, pair.B)


def test_training_a_stack_restores_the_model(tiny_bert: Path) -> None:
    model, tokenizer = lora_model(tiny_bert, 0.1, BERT)
    each = client(model, 4, 1.0, 8, 0)
    training = TrainingSettings(steps=2, batch_size=4)
    before = train_alone(model, tokenizer, each, training)
    replaced = {name for name, module in model.peft.named_modules() if "forward" in vars(module)}
    train_stacked(model, tokenizer, [each, each], training)
    after = train_alone(model, tokenizer, each, training)
    assert before[2] == after[2]
    assert {name for name, module in model.peft.named_modules() if "forward" in vars(module)} == replaced


@pytest.mark.parametrize(("shared", "reason"), [(True, "saw batches of"), (False, None)])
def test_a_layer_that_sees_other_rows_than_the_batch_is_not_stacked(shared: bool, reason: str | None) -> None:
    """If it is shared, DeBERTa's query layer also gets the table of relative positions."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "deberta-v2",
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=16,
        share_att_key=shared,
        num_labels=3,
    )
    model = LoraModel(
        AutoModelForSequenceClassification.from_config(config), LoraSettings(target_modules=("query_proj",))
    )
    obstacle = reason_not_to_stack(model)
    assert obstacle is None if reason is None else reason in str(obstacle)


def test_a_head_with_layers_other_than_linear_is_not_stacked(tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    base = load_base(ModelSettings(name=str(tiny_bert)), 3, tokenizer, seed=1)
    base.classifier = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 3))
    model = LoraModel(base, LoraSettings(modules_to_save=("classifier",)))
    assert "LayerNorm" in str(reason_not_to_stack(model))
    with pytest.raises(ValueError, match="only Linear can be stacked"):
        train_stacked(model, tokenizer, [], TrainingSettings())
