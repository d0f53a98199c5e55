"""One client's local training, and the evaluation of a model."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from fedelta.data import Examples
from fedelta.errors import FedeltaError
from fedelta.metrics import classification_scores
from fedelta.model import LoraModel
from fedelta.seeds import derive_seed
from fedelta.settings import Settings
from fedelta.stopwatch import Stopwatch
from fedelta.training.micro_batches import like_lengths


class TrainingSettings(Settings):
    """A client's local training; every round starts a fresh optimiser.

    Args:
        epochs: over the client's rows, unless `steps` is given.
        steps: optimiser steps instead of epochs.
        batch_size: texts a step.
        learning_rate: its peak.
        optimizer: AdamW or plain SGD.
        schedule: of the learning rate within one local training.
        warmup: share of the local steps that warm up.
        max_grad_norm: gradients are clipped to this norm; None leaves them.
        micro_batches: a step goes through texts of like length together, which spares padding; its gradient is that
            of the whole batch.
    """

    epochs: int = Field(default=1, ge=1)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = Field(default=0.0, ge=0, lt=1)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    micro_batches: bool = True


def train(
    model: LoraModel,
    tokenizer: Any,
    examples: Examples,
    settings: TrainingSettings,
    seed: int,
    penalty: Callable[[], Tensor | None] = lambda: None,
    watch: Stopwatch | None = None,
) -> float:
    """Train what the model has loaded, in place.

    Args:
        model: with the client's adapter, heads and patch.
        examples: the client's training rows.
        seed: of the order of batches and of dropout.
        penalty: what a method adds to the loss, evaluated at each step; None is nothing.
        watch: counts the seconds of each phase, and tokens.

    Returns:
        Mean training loss over the steps, without the penalty.

    Raises:
        FedeltaError: if there is nothing to train on.
    """
    from transformers import get_scheduler

    if len(examples) == 0:
        raise FedeltaError("no training examples")
    per_epoch = -(-len(examples) // settings.batch_size)
    steps = settings.steps or settings.epochs * per_epoch
    parameters = model.parameters
    rate = settings.learning_rate
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=settings.weight_decay)
    else:
        optimizer = torch.optim.SGD(parameters, rate, weight_decay=settings.weight_decay)
    name = settings.schedule if settings.schedule != "constant" else "constant_with_warmup"
    scheduler = get_scheduler(name, optimizer, int(settings.warmup * steps), steps)
    losses: list[float] = []
    watch = watch or Stopwatch()
    # Dropout draws from the global generator: fork it, so that a client's training depends on its seed alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.peft.train()
        epoch = 0
        while len(losses) < steps:
            for rows in examples.training_order(settings.batch_size, derive_seed(seed, "epoch", epoch)):
                parts = like_lengths(rows, examples.length, model.device) if settings.micro_batches else [rows]
                total = 0.0
                for part in parts:
                    batch = examples.batch(part, tokenizer, model.device)
                    lengths = [examples.length(row) for row in part]
                    watch.counts["tokens"] += sum(lengths)
                    watch.counts["squares"] += sum(length**2 for length in lengths)
                    watch.counts["padded_tokens"] += batch["input_ids"].numel()
                    watch.lap("batches")
                    # The model's loss is a mean over texts, so a part counts by its share of them.
                    loss = model.peft(**batch).loss * (len(part) / len(rows))
                    total += float(loss.detach())
                    watch.lap("forward")
                    loss.backward()
                    watch.lap("backward")
                extra = penalty()
                if extra is not None:
                    extra.backward()
                if settings.max_grad_norm is not None:
                    clip_grad_norm_(parameters, settings.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                watch.lap("optimiser")
                losses.append(total)
                if len(losses) == steps:
                    break
            epoch += 1
    return sum(losses) / len(losses)


@torch.no_grad()
def predict(model: LoraModel, tokenizer: Any, examples: Examples, rows: Sequence[int]) -> tuple[list[float], list[int]]:
    """Loss and predicted class of each of these texts, as one batch through the loaded model."""
    model.peft.eval()
    batch = examples.batch(rows, tokenizer, model.device)
    logits = model.peft(**batch).logits.float()
    return cross_entropy(logits, batch["labels"], reduction="none").tolist(), logits.argmax(-1).tolist()


def score(
    examples: Examples, batches: Sequence[Sequence[int]], found: Sequence[tuple[list[float], list[int]]]
) -> dict[str, float]:
    """`loss` (mean over texts), `accuracy` and `macro_f1` of what `predict` found in these batches."""
    losses = [loss for batch, _ in found for loss in batch]
    predictions = [prediction for _, batch in found for prediction in batch]
    labels = [examples.labels[row] for rows in batches for row in rows]
    return {"loss": math.fsum(losses) / len(losses), **classification_scores(labels, predictions)}


def evaluate(model: LoraModel, tokenizer: Any, examples: Examples, batch_size: int) -> dict[str, float]:
    """Scores of the loaded model."""
    batches = list(examples.evaluation_order(batch_size))
    return score(examples, batches, [predict(model, tokenizer, examples, rows) for rows in batches])
