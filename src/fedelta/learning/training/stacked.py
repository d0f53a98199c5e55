"""Several clients in one forward and backward pass over the base model they share.

A batch holds the rows of all clients, those of one client together. The frozen base sees them as one batch; LoRA and
heads multiply with a leading client dimension. Every client has parameters of its own, of its own rank: they are padded
with zeros as they are stacked, so what a client does not have is neither stored nor trained. Optimizer,
schedule, clipping and order of batches are those of `local`, one of each a client, so that a client that is done just
leaves the stack.

It pays where a client brings few tokens, or on a GPU; elsewhere a product is as fast with one client (PERFORMANCE).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

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
from fedelta.learning.training.stopwatch import Stopwatch
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.seeds import torch_seed


@dataclass(frozen=True, eq=False)
class StackedClient:
    """One client of a stack.

    Args:
        adapter: where it starts, of any rank and scale.
        heads: likewise.
        examples: its training rows.
        seed: of the order of batches and of dropout.
        factors: which it trains, out of "A" and "B".
        penalty: what a method adds to its loss, a function of the factors in training.
    """

    adapter: Adapter
    heads: Mapping[str, Tensor]
    examples: Examples
    seed: int
    factors: frozenset[str] = frozenset({"A", "B"})
    penalty: Callable[[Adapter], Tensor | None] = lambda _: None


@dataclass(frozen=True, eq=False)
class Trained:
    """What a client ends with: copies on the CPU, and its mean training loss over the steps, without the penalty."""

    adapter: Adapter
    heads: dict[str, Tensor]
    loss: float


_REASONS: WeakKeyDictionary[LoraModel, str | None] = WeakKeyDictionary()


def can_stack(model: LoraModel) -> str | None:
    """Why this model can't train several clients at once; None if it can.

    Found by trial, once a model: each layer that is a client's own must see the rows of a batch, once and in order.
    """
    if model not in _REASONS:
        _REASONS[model] = _reason(model)
    return _REASONS[model]


@torch.no_grad()
def _reason(model: LoraModel, rows: int = 3, tokens: int = 5) -> str | None:
    drops = any(isinstance(module, Dropout) and module.p > 0 for module in model.peft.modules())
    if drops and getattr(model.peft.get_base_model(), "is_gradient_checkpointing", False):
        return "with checkpointing the backward pass would draw other dropout than the forward pass"
    own: dict[str, nn.Module] = dict(model.layers)
    for name, head in model.active_heads().items():
        for part, module in head.named_modules():
            if list(module.parameters(recurse=False)):
                own[f"{name}.{part}" if part else name] = module
                if not isinstance(module, nn.Linear):
                    return f"head {name}.{part} is a {type(module).__name__}, and only Linear is stacked"
    seen: dict[str, list[int]] = {name: [] for name in own}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(len(inputs[0])))
        for name, module in own.items()
    ]
    training = model.peft.training
    try:
        # Token 0 is often padding, with a text's end sought before it.
        batch = torch.full((rows, tokens), 2, device=model.device)
        model.peft.eval()
        model.peft(input_ids=batch, attention_mask=torch.ones_like(batch))
    finally:
        model.peft.train(training)
        for hook in hooks:
            hook.remove()
    for name, batches in seen.items():
        if batches != [rows]:
            return f"module {name} saw batches of {batches} where the model got {rows} texts"
    return None


def train_stacked(
    model: LoraModel,
    tokenizer: Any,
    clients: Sequence[StackedClient],
    settings: TrainingSettings,
    watch: Stopwatch | None = None,
) -> list[Trained]:
    """Train some clients at once; each ends where it would have ended alone, to rounding.

    On the CPU dropout, too, is that of each client alone without micro-batches, except inside a fused attention kernel.
    On other devices, and there, all clients draw from one generator: dropout then depends on who is in the stack.

    Args:
        model: prepared for some adapter; what it has loaded is left alone.
        clients: that start together, of any ranks and sizes.
        watch: counts the seconds of each phase, and tokens.

    Raises:
        ValueError: if the model can't be stacked.
        FedeltaError: if a client has nothing to train on.
    """
    if reason := can_stack(model):
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
            rows = {k: mine for k in range(len(clients)) if (mine := next(batches[k], None))}
            if not rows:
                break
            batch = stack.pad(tokenizer, rows)
            for k, mine in rows.items():
                watch.add({}, count_texts([clients[k].examples.length(row) for row in mine]))
            watch.counts["padded_tokens"] += batch["input_ids"].numel()
            watch.lap("batches")
            found = stack.losses(batch, rows)
            total = torch.stack(list(found.values())).sum()
            for k in rows:
                extra = clients[k].penalty(stack.adapter(k))
                total = total if extra is None else total + extra
            watch.lap("forward")
            total.backward()
            watch.lap("backward")
            for k, loss in found.items():
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
    """The clients in the batch at hand, and how many rows and tokens of it are each one's own."""

    clients: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)


class _Stack:
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
            # In a fixed order, whatever the message's was: norms are sums, and sums have an order.
            {name: nn.Parameter(client.heads[name].to(device, copy=True)) for name in sorted(client.heads)}
            for client in clients
        ]
        self.generators = [torch.Generator(device).manual_seed(client.seed) for client in clients]

    @property
    def parameters(self) -> list[list[Tensor]]:
        """What each client trains."""
        factors = [[factor for pair in pairs.values() for factor in (pair.A, pair.B)] for pairs in self.pairs]
        return [
            [p for p in [*mine, *tensors.values()] if p.requires_grad]
            for mine, tensors in zip(factors, self.tensors, strict=True)
        ]

    def adapter(self, k: int) -> Adapter:
        return Adapter(self.pairs[k])

    def heads(self, k: int) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.tensors[k].items()}

    def pad(self, tokenizer: Any, rows: Mapping[int, Sequence[int]]) -> dict[str, Tensor]:
        """The rows of all clients as one batch, as many for each."""
        most = max(map(len, rows.values()))
        features: list[dict[str, list[int]]] = []
        labels: list[Any] = []
        sizes = []
        for k, mine in rows.items():
            examples = self.clients[k].examples
            sizes.append((len(mine), max(map(examples.length, mine))))
            # A client with fewer rows repeats one, which is left out of its loss: an empty row would give NaN.
            padded = [*mine, *[mine[0]] * (most - len(mine))]
            features += [examples.features[row] for row in padded]
            labels += [examples.labels[row] for row in padded]
        self.batch = _Batch(list(rows), sizes)
        return Examples(features, labels).batch(range(len(features)), tokenizer, self.model.device)

    def losses(self, batch: Mapping[str, Tensor], rows: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """The mean loss of each client's rows."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = self.model.peft(**inputs).logits.unflatten(0, (len(rows), -1))
        labels = batch["labels"].unflatten(0, (len(rows), -1))
        return {
            k: mean_loss(logits[place, : len(mine)].float(), labels[place, : len(mine)])
            for place, (k, mine) in enumerate(rows.items())
        }

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model's LoRA layers, heads and dropout work on stacks of clients."""
        with ExitStack() as undo:

            def replace(module: nn.Module, forward: Callable[..., Tensor]) -> None:
                module.forward = forward
                # What a class defines comes back once the instance has nothing of its own.
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
            mine = blocks[place, :rows]
            # (rows, tokens, width), attention's (rows, heads, tokens, tokens), or a pooled (rows, width).
            if mine.ndim == 3:
                mine = mine[:, :tokens]
            elif mine.ndim == 4:
                mine = mine[:, :, :tokens, :tokens]
            mine.copy_(draw_mask(mine.shape, module.p, x.dtype, self.generators[k]))
        return x * blocks.view(x.shape)
