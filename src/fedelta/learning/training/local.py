"""Local training of one client."""

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
from fedelta.learning.training.micro_batches import split_by_length
from fedelta.learning.training.packing import pack, packed_batch
from fedelta.learning.training.stopwatch import Stopwatch
from fedelta.seeds import derive_seed, torch_seed
from fedelta.settings import Settings


class TrainingSettings(Settings):
    """Settings of a client's local training. Every round starts with a new optimizer.

    Args:
        epochs: number of epochs over the client's rows, unless `steps` is given.
        steps: number of optimizer steps, instead of epochs.
        batch_size: number of texts per step.
        learning_rate: peak learning rate.
        optimizer: AdamW or plain SGD.
        weight_decay: weight decay of the optimizer.
        schedule: schedule of the learning rate within one local training.
        warmup: share of the local steps used for warm-up.
        max_grad_norm: norm to which gradients are clipped. None does not clip.
        micro_batches: split the batch of a step into texts of similar length, which saves padding. The gradient is
            that of the whole batch.
        micro_batch_size: maximum number of texts per pass, for when memory is short. A step's gradient is accumulated
            over its passes. With `packing`, it is the number of packed rows.
        packing: put several texts into one row of a batch, none longer than the longest text of the step. This saves
            padding, and the gradient is that of the whole batch. No text sees another one; models that can't do this
            are refused. Only for language models, and with `stack` 1 or `auto`.
        stack: number of clients that train in one pass over the base. This is faster if each has few tokens for a
            GPU. The result equals that of training one by one, except for rounding and for which elements are
            dropped out. `auto` measures the best number when a run starts, and stores it with the run; it is 1 if
            `micro_batch_size` limits a pass or `packing` is on.
        deterministic: use only GPU kernels that give the same bits each time, so that a resumed run ends
            bit-identical. `false` can be faster. On a CPU the bits are the same either way.
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
    packing: bool = False
    stack: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    deterministic: bool = True

    @model_validator(mode="after")
    def _passes_of_a_stack(self) -> "TrainingSettings":
        if self.micro_batch_size is not None and self.stack not in (1, "auto"):
            raise ValueError(f"micro_batch_size needs stack: 1 or stack: auto, found stack: {self.stack}")
        if self.packing and self.stack not in (1, "auto"):
            raise ValueError(f"packing: true needs stack: 1 or stack: auto, found stack: {self.stack}")
        return self


class LocalSteps:
    """Optimizer, schedule and batches of one local training.

    Args:
        parameters: parameters to train.
        examples: the client's training rows.
        settings: settings of the training.
        seed: seed of the order of batches.

    Raises:
        FedeltaError: if there are no training rows.
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
        # One kernel for all tensors of a step, if torch has one.
        fused = True if self.parameters[0].is_cuda else None
        self._optimizer = kind(self.parameters, settings.learning_rate, weight_decay=settings.weight_decay, fused=fused)
        name = settings.schedule if settings.schedule != "constant" else "constant_with_warmup"
        self._scheduler = get_scheduler(name, self._optimizer, int(settings.warmup * self.total), self.total)

    def batches(self) -> Iterator[list[int]]:
        """Yield the rows of each step."""
        remaining = self.total
        for epoch in itertools.count():
            for rows in self.examples.training_order(self.settings.batch_size, derive_seed(self.seed, "epoch", epoch)):
                yield rows
                remaining -= 1
                if remaining == 0:
                    return

    def update(self) -> None:
        """Take one step with the current gradients, then clear them."""
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
    """Train the loaded adapter and heads in place.

    Args:
        model: model with the client's adapter, heads and patch.
        tokenizer: the model's tokenizer.
        examples: the client's training rows.
        settings: settings of the training.
        seed: seed of the order of batches and of dropout.
        penalty: term that a method adds to the loss, computed at each step. None adds nothing.
        watch: stopwatch for the seconds of each phase and the numbers of texts and tokens.
        cache: cache of activations, which are not computed again. Packed texts don't use it.

    Returns:
        Mean training loss over the steps, without the penalty.

    Raises:
        FedeltaError: if there are no training rows.
    """
    steps = LocalSteps(model.parameters, examples, settings, seed)
    watch = watch or Stopwatch()
    losses: list[list[Tensor]] = []
    # Dropout draws from the global generator. Seed it, so that a client's training depends only on its own seed.
    with torch_seed(seed, model.device), deterministic(model.device, settings.deterministic):
        model.peft.train()
        for rows in steps.batches():
            whole = examples.weight(rows)
            losses.append([])
            for part, batch in _passes(rows, examples, tokenizer, settings, model):
                count_tokens(watch, examples, part, batch)
                watch.lap("batches")
                # The model's loss is a mean over texts or tokens, so weight a part by its share of them.
                with replayed(None if settings.packing else cache, examples, part, batch):
                    loss = model.peft(**batch).loss * (examples.weight(part) / whole)
                # The number is read after the last step, because reading it here would make a GPU wait.
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


def _passes(
    rows: list[int], examples: Examples, tokenizer: Any, settings: TrainingSettings, model: LoraModel
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Split the rows of a step into passes, and yield the rows and the batch of each."""
    if not settings.packing:
        for part in _parts(rows, examples.length, settings, model):
            yield part, examples.batch(part, tokenizer, model.device)
        return
    packed = pack(rows, examples.length)
    lengths = [sum(map(examples.length, texts)) for texts in packed]
    for part in _parts(range(len(packed)), lengths.__getitem__, settings, model):
        texts = [packed[row] for row in part]
        yield list(itertools.chain(*texts)), packed_batch(examples, texts, tokenizer, model.device)


def _parts(
    rows: Sequence[int], length: Callable[[int], int], settings: TrainingSettings, model: LoraModel
) -> list[list[int]]:
    """Split the rows of a batch into those of each pass."""
    max_rows = settings.micro_batch_size or len(rows)
    if settings.micro_batches:
        return split_by_length(rows, length, model.device, model.dtype, max_rows)
    return [list(rows[begin : begin + max_rows]) for begin in range(0, len(rows), max_rows)]


def count_tokens(watch: Stopwatch, examples: Examples, rows: Sequence[int], batch: Mapping[str, Tensor]) -> None:
    """Add a batch to the watch's counts of texts, of tokens, and of tokens including padding."""
    watch.add({}, count_texts([examples.length(row) for row in rows]))
    watch.counts["padded_tokens"] += batch["input_ids"].numel()
