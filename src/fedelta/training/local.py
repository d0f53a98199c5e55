"""One client's local training, and the evaluation of a model."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fedelta.data import Examples
from fedelta.errors import FedeltaError
from fedelta.metrics import classification_scores
from fedelta.model import LoraModel
from fedelta.seeds import derive_seed
from fedelta.settings import Settings


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


def train(
    model: LoraModel,
    tokenizer: Any,
    examples: Examples,
    settings: TrainingSettings,
    seed: int,
    penalty: Callable[[], Tensor | None] = lambda: None,
) -> float:
    """Train what the model has loaded, in place.

    Args:
        model: with the client's adapter, heads and patch.
        examples: the client's training rows.
        seed: of the order of batches and of dropout.
        penalty: what a method adds to the loss, evaluated at each step; None is nothing.

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
    # Dropout draws from the global generator: fork it, so that a client's training depends on its seed alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.peft.train()
        epoch = 0
        while len(losses) < steps:
            for rows in examples.training_order(settings.batch_size, derive_seed(seed, "epoch", epoch)):
                loss = model.peft(**examples.batch(rows, tokenizer, model.device)).loss
                extra = penalty()
                (loss if extra is None else loss + extra).backward()
                if settings.max_grad_norm is not None:
                    clip_grad_norm_(parameters, settings.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
                if len(losses) == steps:
                    break
            epoch += 1
    return sum(losses) / len(losses)


@torch.no_grad()
def evaluate(
    model: LoraModel,
    tokenizer: Any,
    examples: Examples,
    batch_size: int,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """`loss` (mean over texts), `accuracy` and `macro_f1` of the loaded model.

    Args:
        progress: called with the number of texts after each batch.
    """
    model.peft.eval()
    total = 0.0
    labels: list[int] = []
    predictions: list[int] = []
    for rows in examples.evaluation_order(batch_size):
        batch = examples.batch(rows, tokenizer, model.device)
        output = model.peft(**batch)
        total += float(output.loss) * len(rows)
        labels += batch["labels"].tolist()
        predictions += output.logits.argmax(-1).tolist()
        progress(len(rows))
    return {"loss": total / len(examples), **classification_scores(labels, predictions)}
