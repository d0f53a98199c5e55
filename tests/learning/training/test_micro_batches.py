"""Splitting a batch by length saves padding and gives the gradient of the whole batch."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fedelta.learning.data import Examples
from fedelta.learning.model.base_model import ModelSettings, load_base
from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.learning.tasks import Classification, evaluate
from fedelta.learning.training import TrainingSettings, train
from fedelta.learning.training.micro_batches import PASS_OVERHEAD, split_by_length
from fedelta.lora.adapter import Adapter, initial_adapter

CPU = torch.device("cpu")


@pytest.fixture
def lora_model(tiny_bert: Path) -> Any:
    """Factory of a new model without dropout, texts of unequal lengths, an initial adapter and heads."""

    def make() -> tuple[LoraModel, Any, Examples, Adapter, dict[str, torch.Tensor]]:
        tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(4, 40, (30 if i % 3 == 0 else 3 + i % 4,), generator=generator) for i in range(40)]
        examples = Examples([{"input_ids": row.tolist()} for row in rows], [i % 3 for i in range(40)])
        base = load_base(ModelSettings(name=str(tiny_bert)), 3, tokenizer, seed=1)
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # Attention reads this attribute too.
        model = LoraModel(base, LoraSettings())
        return model, tokenizer, examples, initial_adapter(model.shapes, 3, 0).with_scale(2.0), model.head_tensors()

    return make


def cost(parts: list[list[int]], lengths: list[int]) -> int:
    return sum(PASS_OVERHEAD["cpu", torch.float32] + len(part) * max(lengths[i] for i in part) for part in parts)


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=7))
def test_parts_hold_every_row_once_at_the_minimum_cost(lengths: list[int]) -> None:
    rows = list(range(len(lengths)))
    parts = split_by_length(rows, lengths.__getitem__, CPU, torch.float32)
    assert sorted(itertools.chain(*parts)) == rows
    order = sorted(rows, key=lengths.__getitem__)
    every = []
    for cuts in itertools.product([False, True], repeat=len(rows) - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut]
        every.append([order[b:e] for b, e in zip([0, *ends], [*ends, len(rows)], strict=True)])
    assert cost(parts, lengths) == min(cost(each, lengths) for each in every)


def test_equal_lengths_stay_together() -> None:
    assert split_by_length([3, 1, 2], lambda _: 50, CPU, torch.float32) == [[1, 2, 3]]
    assert split_by_length([0, 1], [1, 1000].__getitem__, torch.device("cuda"), torch.float32) == [[0, 1]]


@pytest.mark.parametrize("penalized", [False, True])
def test_training_in_parts_equals_training_on_whole_batches(penalized: bool, lora_model: Any) -> None:
    """Twenty steps with clipping."""
    results = []
    for micro in (True, False):
        model, tokenizer, examples, start, heads = lora_model()
        model.load(start, heads)
        lengths = examples.lengths
        assert len(split_by_length(list(range(8)), lengths.__getitem__, CPU, torch.float32)) > 1
        training = TrainingSettings(steps=20, batch_size=8, learning_rate=1e-3, micro_batches=micro)

        def penalty(model: Any = model) -> Any:
            return sum(p.square().sum() for p in model.parameters) if penalized else None

        loss = train(model, tokenizer, examples, training, 1, penalty)
        results.append(
            (loss, model.read(), model.head_tensors(), evaluate(Classification(), model, tokenizer, examples, 5))
        )
    (loss, adapter, heads, scores), (other_loss, other, other_heads, other_scores) = results
    assert loss == pytest.approx(other_loss, rel=1e-5)
    for module, pair in adapter.items():
        for factor, expected in ((pair.A, other[module].A), (pair.B, other[module].B)):
            assert float((factor - expected).norm() / expected.norm()) < 1e-5
    for name, tensor in heads.items():
        assert float((tensor - other_heads[name]).norm() / other_heads[name].norm()) < 1e-5
    assert scores["loss"] == pytest.approx(other_scores["loss"], rel=1e-5)


def test_evaluation_does_not_depend_on_the_batches(lora_model: Any) -> None:
    model, tokenizer, examples, start, heads = lora_model()
    model.load(start, heads)
    one, many = (evaluate(Classification(), model, tokenizer, examples, size) for size in (1, 32))
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-5)
    assert one["accuracy"] == many["accuracy"]
