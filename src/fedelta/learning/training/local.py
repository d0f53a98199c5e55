"""One client's local training."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fedelta.errors import FedeltaError
from fedelta.learning.data import Examples
from fedelta.learning.device import deterministic
from fedelta.learning.model.activation_cache import ActivationCache, replayed
from fedelta.learning.model.lora_model import LoraModel
from fedelta.learning.training.flops import count_texts
from fedelta.learning.training.micro_batches import like_lengths
from fedelta.learning.training.stopwatch import Stopwatch
from fedelta.seeds import derive_seed, torch_seed
from fedelta.settings import Settings


class TrainingSettings(Settings):
    """A client's local training; every round starts a fresh optimizer.

    Args:
        epochs: over the client's rows, unless `steps` is given.
        steps: optimizer steps instead of epochs.
        batch_size: texts a step.
        learning_rate: its peak.
        optimizer: AdamW or plain SGD.
        schedule: of the learning rate within one local training.
        warmup: share of the local steps that warm up.
        max_grad_norm: gradients are clipped to this norm; None leaves them.
        micro_batches: a step goes through texts of like length together, which spares padding; its gradient is that
            of the whole batch.
        micro_batch_size: texts in a pass at most, where memory is short: a step's gradient is accumulated over its
            passes.
        stack: clients that train in one pass over the base, which is faster where each brings few tokens to a GPU;
            equal to one by one up to rounding and to which elements drop out. `auto` measures when a run begins, and
            keeps the number with it; it is 1 where `micro_batch_size` limits a pass.
        deterministic: on a GPU, use only kernels that give the same bits each time, so that a resumed run ends
            bit-identical. `false` can be faster; a CPU gives the same bits either way.
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
    micro_batch_size: int | None = Field(default=None, ge=1)
    stack: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    deterministic: bool = True

    @model_validator(mode="after")
    def _passes_of_a_stack(self) -> "TrainingSettings":
        if self.micro_batch_size is not None and self.stack not in (1, "auto"):
            raise ValueError(f"micro_batch_size needs stack: 1, or auto, found stack: {self.stack}")
        return self


class LocalSteps:
    """The optimizer of one local training, its schedule, and its batches in order.

    Args:
        parameters: that are trained.
        examples: the client's training rows.
        seed: of the order of batches.

    Raises:
        FedeltaError: if there is nothing to train on.
    """

    def __init__(self, parameters: Sequence[Tensor], examples: Examples, settings: TrainingSettings, seed: int) -> None:
        from transformers import get_scheduler

        if len(examples) == 0:
            raise FedeltaError("no training examples")
        self.parameters = list(parameters)
        self.examples = examples
        self.settings = settings
        self.seed = seed
        per_epoch = -(-len(examples) // settings.batch_size)
        self.total = settings.steps or settings.epochs * per_epoch
        kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.SGD
        # One kernel for all tensors of a step, where torch has one.
        fused = True if self.parameters[0].is_cuda else None
        self._optimizer = kind(self.parameters, settings.learning_rate, weight_decay=settings.weight_decay, fused=fused)
        name = settings.schedule if settings.schedule != "constant" else "constant_with_warmup"
        self._scheduler = get_scheduler(name, self._optimizer, int(settings.warmup * self.total), self.total)

    def batches(self) -> Iterator[list[int]]:
        """The rows of each step."""
        left = self.total
        for epoch in itertools.count():
            for rows in self.examples.training_order(self.settings.batch_size, derive_seed(self.seed, "epoch", epoch)):
                yield rows
                left -= 1
                if left == 0:
                    return

    def update(self) -> None:
        """One step along the gradients, which are used up."""
        if self.settings.max_grad_norm is not None:
            clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()


def train(
    model: LoraModel,
    tokenizer: Any,
    examples: Examples,
    settings: TrainingSettings,
    seed: int,
    penalty: Callable[[], Tensor | None] = lambda: None,
    watch: Stopwatch | None = None,
    cache: ActivationCache | None = None,
) -> float:
    """Train what the model has loaded, in place.

    Args:
        model: with the client's adapter, heads and patch.
        examples: the client's training rows.
        seed: of the order of batches and of dropout.
        penalty: what a method adds to the loss, evaluated at each step; None is nothing.
        watch: counts the seconds of each phase, and tokens.
        cache: what it keeps of the examples is not computed again.

    Returns:
        Mean training loss over the steps, without the penalty.

    Raises:
        FedeltaError: if there is nothing to train on.
    """
    steps = LocalSteps(model.parameters, examples, settings, seed)
    watch = watch or Stopwatch()
    losses: list[list[Tensor]] = []
    # Dropout draws from the global generator: seed it, so that a client's training depends on its seed alone.
    with torch_seed(seed, model.device), deterministic(model.device, settings.deterministic):
        model.peft.train()
        for rows in steps.batches():
            parts = _parts(rows, examples, settings, model)
            whole = examples.weight(rows)
            losses.append([])
            for part in parts:
                batch = examples.batch(part, tokenizer, model.device)
                count_tokens(watch, examples, part, batch)
                watch.lap("batches")
                # The model's loss is a mean over texts, or over tokens: a part counts by its share of them.
                with replayed(cache, examples, part, batch):
                    loss = model.peft(**batch).loss * (examples.weight(part) / whole)
                # Read after the last step: a GPU would wait for each number that is read here.
                losses[-1].append(loss.detach())
                watch.lap("forward")
                loss.backward()
                watch.lap("backward")
            extra = penalty()
            if extra is not None:
                extra.backward()
            steps.update()
            watch.lap("optimizer")
    return sum(sum(map(float, parts)) for parts in losses) / len(losses)


def _parts(rows: list[int], examples: Examples, settings: TrainingSettings, model: LoraModel) -> list[list[int]]:
    """The passes of a step."""
    most = settings.micro_batch_size or len(rows)
    if settings.micro_batches:
        return like_lengths(rows, examples.length, model.device, model.dtype, most)
    return [rows[begin : begin + most] for begin in range(0, len(rows), most)]


def count_tokens(watch: Stopwatch, examples: Examples, rows: Sequence[int], batch: Mapping[str, Tensor]) -> None:
    """Add a batch to the counts of texts, and of tokens with padding."""
    watch.add({}, count_texts([examples.length(row) for row in rows]))
    watch.counts["padded_tokens"] += batch["input_ids"].numel()
