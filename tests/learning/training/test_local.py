"""Local training and evaluation equal loops written by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from fedelta.errors import FedeltaError
from fedelta.learning.data import Examples
from fedelta.learning.model.base_model import ModelSettings, load_base
from fedelta.learning.model.dropout import Dropout
from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.learning.tasks import Classification, evaluate
from fedelta.learning.training import TrainingSettings, train
from fedelta.lora.adapter import initial_adapter
from fedelta.seeds import derive_seed


@pytest.fixture
def tokenizer(tiny_bert: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture
def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (21,), generator=generator).tolist()
    rows = [torch.randint(4, 40, (length,), generator=generator).tolist() for length in lengths]
    return Examples([{"input_ids": row} for row in rows], [i % 3 for i in range(21)])


def fresh(tiny_bert: Path, tokenizer: Any, **lora: Any) -> LoraModel:
    model = LoraModel(load_base(ModelSettings(name=str(tiny_bert)), 3, tokenizer, seed=1), LoraSettings(**lora))
    model.load(initial_adapter(model.shapes, 3, 0).with_scale(2.0), model.head_tensors())
    return model


SETTINGS = TrainingSettings(
    epochs=2, batch_size=8, learning_rate=0.02, weight_decay=0.1, schedule="linear", warmup=0.34, max_grad_norm=0.5
)


def test_training_equals_a_loop_written_by_hand(tiny_bert: Path, tokenizer: Any, examples: Examples) -> None:
    """AdamW with clipped gradients, and linear warm-up and decay, over two epochs of three batches."""
    ours, by_hand = fresh(tiny_bert, tokenizer), fresh(tiny_bert, tokenizer)
    loss = train(ours, tokenizer, examples, SETTINGS, seed=5)
    parameters = by_hand.parameters
    optimizer = torch.optim.AdamW(parameters, 0.02, weight_decay=0.1)
    rates = [0.0, 0.01, 0.02, 0.015, 0.01, 0.005]
    batches = [b for epoch in (0, 1) for b in examples.training_order(8, derive_seed(5, "epoch", epoch))]
    losses = []
    for rate, rows in zip(rates, batches, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = examples.batch(rows, tokenizer)
        labels = batch.pop("labels")
        value = cross_entropy(by_hand.peft(**batch).logits, labels)
        gradients = torch.autograd.grad(value, parameters)
        norm = torch.sqrt(sum((g**2).sum() for g in gradients))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * min(1.0, 0.5 / float(norm))
        optimizer.step()
        losses.append(float(value.detach()))
    assert loss == pytest.approx(sum(losses) / 6, rel=1e-4)
    for module, pair in by_hand.read().items():
        assert torch.allclose(ours.read()[module].A, pair.A, atol=1e-5)
        assert torch.allclose(ours.read()[module].B, pair.B, atol=1e-5)


@pytest.fixture(autouse=True)
def _no_dropout(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:  # noqa: ARG001
    if "dropout" not in request.node.name:
        for kind in (torch.nn.Dropout, Dropout):
            monkeypatch.setattr(kind, "forward", lambda _, x: x)
        attention = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", _without_dropout(attention))


def _without_dropout(attention: Any) -> Any:
    def plain(*arguments: Any, **options: Any) -> Any:
        return attention(*arguments, **{**options, "dropout_p": 0.0})

    return plain


def test_training_can_end_within_an_epoch(tiny_bert: Path, tokenizer: Any, examples: Examples) -> None:
    counted = []
    model = fresh(tiny_bert, tokenizer)
    model.peft.register_forward_hook(lambda *_: counted.append(1))
    train(model, tokenizer, examples, TrainingSettings(steps=5, batch_size=8, micro_batches=False), seed=0)
    assert len(counted) == 5


def test_dropout_depends_only_on_the_seed(tiny_bert: Path, tokenizer: Any, examples: Examples) -> None:
    results = []
    for noise, seed in ((1, 5), (2, 5), (3, 6)):
        torch.manual_seed(noise)
        model = fresh(tiny_bert, tokenizer, dropout=0.3)
        state = torch.get_rng_state()
        train(model, tokenizer, examples, TrainingSettings(steps=3), seed=seed)
        assert torch.equal(torch.get_rng_state(), state), "the state of the global generator is restored"
        results.append(next(iter(model.read().values())).A)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_evaluation_is_the_mean_over_texts_for_every_batch_size(
    tiny_bert: Path, tokenizer: Any, examples: Examples
) -> None:
    model = fresh(tiny_bert, tokenizer)
    losses, correct = [], 0
    with torch.no_grad():
        for i in range(len(examples)):
            batch = examples.batch([i], tokenizer)
            logits = model.peft.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            losses.append(float(cross_entropy(logits, batch["labels"])))
            correct += int(logits.argmax() == batch["labels"])
    for size in (1, 4, 21):
        scores = evaluate(Classification(), model, tokenizer, examples, size)
        assert scores["loss"] == pytest.approx(sum(losses) / 21, rel=1e-5)
        assert scores["accuracy"] == pytest.approx(correct / 21)


def test_training_without_examples_is_refused(tiny_bert: Path, tokenizer: Any) -> None:
    with pytest.raises(FedeltaError, match="no training examples"):
        train(fresh(tiny_bert, tokenizer), tokenizer, Examples([], []), TrainingSettings(), seed=0)
