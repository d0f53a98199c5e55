"""Training of several clients in one forward and backward pass over the base model that they share.

A batch holds the rows of all clients, grouped by client, and the frozen base treats them as one batch. LoRA and heads
multiply with a leading client dimension. Each client has its own parameters at its own rank. Only the stacked copies
are padded with zeros, so padding is neither stored nor trained. Each client also has its own optimizer, schedule,
clipping and order of batches, all from `local`, so a client that has finished simply leaves the stack.

Stacking is faster if clients have few tokens per batch, or on a GPU. Otherwise products are as fast with one client.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fedelta.learning.data import Examples
from fedelta.learning.device import deterministic
from fedelta.learning.model.dropout import Dropout, draw_mask
from fedelta.learning.model.lora_model import LoraModel
from fedelta.learning.training.flops import count_texts
from fedelta.learning.training.local import LocalSteps, TrainingSettings
from fedelta.learning.training.loss import mean_loss
from fedelta.learning.training.stackable import reason_not_to_stack
from fedelta.learning.training.stopwatch import Stopwatch
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.seeds import torch_seed


@dataclass(frozen=True, eq=False)
class StackedClient:
    """One client of a stack.

    Args:
        adapter: its initial adapter, of any rank and scale.
        heads: its initial heads.
        examples: its training rows.
        seed: seed of the order of batches and of dropout.
        factors: factors that it trains, out of "A" and "B".
        penalty: term that a method adds to its loss, as a function of the factors in training.
    """

    adapter: Adapter
    heads: Mapping[str, Tensor]
    examples: Examples
    seed: int
    factors: frozenset[str] = frozenset({"A", "B"})
    penalty: Callable[[Adapter], Tensor | None] = lambda _: None


@dataclass(frozen=True, eq=False)
class Trained:
    """Result of a client's training: copies on the CPU, and its mean loss over the steps, without the penalty."""

    adapter: Adapter
    heads: dict[str, Tensor]
    loss: float


def train_stacked(
    model: LoraModel,
    tokenizer: Any,
    clients: Sequence[StackedClient],
    settings: TrainingSettings,
    watch: Stopwatch | None = None,
) -> list[Trained]:
    """Train several clients at once, with the same result for each as training it alone, up to rounding.

    On a CPU, dropout equals that of each client alone without micro-batches, except inside fused attention. There, and
    on other devices, all clients draw from one generator, so that dropout depends on the clients in the stack.

    Args:
        model: model prepared for some adapter. The loaded adapter and heads stay unchanged.
        tokenizer: the model's tokenizer.
        clients: clients that start together, of any ranks and sizes.
        settings: settings of the training.
        watch: stopwatch for the seconds of each phase and the numbers of texts and tokens.

    Raises:
        ValueError: if the model can't be stacked.
        FedeltaError: if a client has no training rows.
    """
    if reason := reason_not_to_stack(model):
        raise ValueError(reason)
    watch = watch or Stopwatch()
    stack = _Stack(model, clients)
    steps = [
        LocalSteps(stack.parameters[k], client.examples, settings, client.seed) for k, client in enumerate(clients)
    ]
    batches = [each.batches() for each in steps]
    losses: list[list[Tensor]] = [[] for _ in clients]
    model.peft.train()
    device = model.device
    with stack.installed(), torch_seed(clients[0].seed, device), deterministic(device, settings.deterministic):
        while True:
            rows = {k: client_rows for k in range(len(clients)) if (client_rows := next(batches[k], None))}
            if not rows:
                break
            batch = stack.pad(tokenizer, rows)
            for k, client_rows in rows.items():
                watch.add({}, count_texts([clients[k].examples.length(row) for row in client_rows]))
            watch.counts["padded_tokens"] += batch["input_ids"].numel()
            watch.lap("batches")
            batch_losses = stack.losses(batch, rows)
            total = torch.stack(list(batch_losses.values())).sum()
            for k in rows:
                extra = clients[k].penalty(stack.adapter(k))
                total = total if extra is None else total + extra
            watch.lap("forward")
            total.backward()
            watch.lap("backward")
            for k, loss in batch_losses.items():
                steps[k].update()
                losses[k].append(loss.detach())
            watch.lap("optimizer")
    return [
        Trained(stack.adapter(k).map(_copy), stack.heads(k), sum(map(float, losses[k])) / len(losses[k]))
        for k in range(len(clients))
    ]


def _copy(pair: LoraPair) -> LoraPair:
    return LoraPair(pair.A.detach().cpu().clone(), pair.B.detach().cpu().clone(), pair.scale)


@dataclass
class _Batch:
    """Clients in the current batch, and the (rows, tokens) of each one without padding."""

    clients: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)


class _Stack:
    """Parameters of all clients, and forward passes that use them in place of the model's own."""

    def __init__(self, model: LoraModel, clients: Sequence[StackedClient]) -> None:
        self.model = model
        self.clients = clients
        self.batch = _Batch()
        device = model.device
        self.pairs = [
            {
                module: LoraPair(
                    nn.Parameter(pair.A.to(device, copy=True), "A" in client.factors),
                    nn.Parameter(pair.B.to(device, copy=True), "B" in client.factors),
                    pair.scale,
                )
                for module, pair in client.adapter.items()
            }
            for client in clients
        ]
        self.tensors = [
            # In a fixed order, independent of that in the message, because the rounding of a norm depends on it.
            {name: nn.Parameter(client.heads[name].to(device, copy=True)) for name in sorted(client.heads)}
            for client in clients
        ]
        self.generators = [torch.Generator(device).manual_seed(client.seed) for client in clients]

    @property
    def parameters(self) -> list[list[Tensor]]:
        """Parameters that each client trains."""
        factors = [[factor for pair in pairs.values() for factor in (pair.A, pair.B)] for pairs in self.pairs]
        return [
            [p for p in [*client_factors, *tensors.values()] if p.requires_grad]
            for client_factors, tensors in zip(factors, self.tensors, strict=True)
        ]

    def adapter(self, k: int) -> Adapter:
        return Adapter(self.pairs[k])

    def heads(self, k: int) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.tensors[k].items()}

    def pad(self, tokenizer: Any, rows: Mapping[int, Sequence[int]]) -> dict[str, Tensor]:
        """Collate the rows of all clients into one batch, with the same number of rows for each client."""
        max_rows = max(map(len, rows.values()))
        features: list[dict[str, list[int]]] = []
        labels: list[Any] = []
        sizes = []
        for k, client_rows in rows.items():
            examples = self.clients[k].examples
            sizes.append((len(client_rows), max(map(examples.length, client_rows))))
            # A client with fewer rows repeats one, and the loss omits it. An empty row would give NaN.
            padded = [*client_rows, *[client_rows[0]] * (max_rows - len(client_rows))]
            features += [examples.features[row] for row in padded]
            labels += [examples.labels[row] for row in padded]
        self.batch = _Batch(list(rows), sizes)
        return Examples(features, labels).batch(range(len(features)), tokenizer, self.model.device)

    def losses(self, batch: Mapping[str, Tensor], rows: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Compute the mean loss of each client's rows."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = self.model.peft(**inputs).logits.unflatten(0, (len(rows), -1))
        labels = batch["labels"].unflatten(0, (len(rows), -1))
        return {
            k: mean_loss(logits[place, : len(client_rows)].float(), labels[place, : len(client_rows)])
            for place, (k, client_rows) in enumerate(rows.items())
        }

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Context in which the model's LoRA layers, heads and dropout work on stacks of clients."""
        with ExitStack() as undo:

            def replace(module: nn.Module, forward: Callable[..., Tensor]) -> None:
                module.forward = forward
                # Removing the attribute of the instance restores the method of its class.
                undo.callback(module.__dict__.pop, "forward")

            for name, layer in self.model.layers.items():
                replace(layer, partial(self._lora, name, layer))
            for name, head in self.model.active_heads().items():
                for part, module in head.named_modules():
                    if isinstance(module, nn.Linear):
                        replace(module, partial(self._linear, f"{name}.{part}" if part else name))
            for module in self.model.peft.modules():
                if isinstance(module, Dropout):
                    replace(module, partial(self._dropout, module))
            yield

    def _lora(self, name: str, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = layer.base_layer(x, *args, **kwargs)
        pairs = [self.pairs[k][name] for k in self.batch.clients]
        rank = max(pair.rank for pair in pairs)
        A = torch.stack([pad(pair.A, (0, 0, 0, rank - pair.rank)) for pair in pairs])
        B = torch.stack([pad(pair.B * pair.scale, (0, rank - pair.rank)) for pair in pairs])
        z = layer.lora_dropout[self.model.active](x.to(A.dtype)).reshape(len(pairs), -1, x.shape[-1])
        update = torch.bmm(torch.bmm(z, A.mT), B.mT)
        return (out + update.reshape(out.shape)).to(out.dtype)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        clients = self.batch.clients
        weight = torch.stack([self.tensors[k][f"{name}.weight"] for k in clients])
        z = torch.bmm(x.reshape(len(clients), -1, x.shape[-1]), weight.mT)
        if f"{name}.bias" in self.tensors[clients[0]]:
            z = z + torch.stack([self.tensors[k][f"{name}.bias"] for k in clients])[:, None]
        return z.reshape(*x.shape[:-1], weight.shape[1])

    def _dropout(self, module: Dropout, x: Tensor) -> Tensor:
        if not module.training or module.p == 0:
            return x
        blocks = x.new_zeros(len(self.batch.clients), len(x) // len(self.batch.clients), *x.shape[1:])
        for place, (k, (rows, tokens)) in enumerate(zip(self.batch.clients, self.batch.sizes, strict=True)):
            block = blocks[place, :rows]
            # (rows, tokens, width), attention's (rows, heads, tokens, tokens), or a pooled (rows, width).
            if block.ndim == 3:
                block = block[:, :tokens]
            elif block.ndim == 4:
                block = block[:, :, :tokens, :tokens]
            block.copy_(draw_mask(block.shape, module.p, x.dtype, self.generators[k]))
        return x * blocks.view(x.shape)
