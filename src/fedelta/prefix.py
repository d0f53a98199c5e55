"""What the frozen layers below the lowest adapter make of a text, computed once and kept.

Nothing that trains and no patch ever reaches those layers, so a text's activations above them are the same in every
round. They are kept for a whole set of texts or not at all, and computed in batches that depend on the set
alone: what a client trains must not depend on who was there before.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedelta.data import Examples
from fedelta.model import LoraModel

FILL_BATCH = 64


class _Reached(Exception):
    """The forward pass has come to where the prefix ends."""


class Prefix:
    """The layers of a model below the lowest one that is adapted, and their activations.

    Args:
        model: with at least one such layer, see `find_prefix`.
        layers: of the backbone, in order.
        depth: how many of them are frozen.

    Attributes:
        drops_out: whether these layers are random in training; then they are kept for evaluation alone.
        hidden, dtype: width and type of what is kept of a token.
    """

    def __init__(self, model: LoraModel, tokenizer: Any, layers: nn.ModuleList, depth: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._frozen = list(layers)[:depth]
        self._kept: WeakKeyDictionary[Examples, list[Tensor]] = WeakKeyDictionary()
        self.depth = depth
        self.drops_out = _drops_out(model, layers, depth)
        self.hidden = int(model.peft.config.hidden_size)
        self.dtype = model.dtype

    def bytes_of(self, examples: Examples) -> int:
        """What keeping these texts takes."""
        return sum(examples.lengths) * self.hidden * self.dtype.itemsize

    def batches(self, examples: Examples) -> list[list[int]]:
        """The rows in the batches that `compute` goes through."""
        return list(examples.evaluation_order(FILL_BATCH))

    @torch.no_grad()
    def compute(self, examples: Examples, rows: Sequence[int]) -> Tensor:
        """Activations of one of `batches`: (tokens of all rows, hidden), row after row, without padding, on the CPU."""
        batch = examples.batch(rows, self._tokenizer, self._model.device)
        found: list[Tensor] = []

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            found.append(output[batch["attention_mask"].bool()].cpu())
            raise _Reached

        hook = self._frozen[-1].register_forward_hook(stop)
        training = self._model.peft.training
        try:
            self._model.peft.eval()
            self._model.peft(**batch)
        except _Reached:
            pass
        finally:
            hook.remove()
            self._model.peft.train(training)
        return found[0]

    def keep(self, examples: Examples, batches: Sequence[Tensor]) -> None:
        """Take what `compute` gave for each of `batches`."""
        texts: dict[int, Tensor] = {}
        for rows, activations in zip(self.batches(examples), batches, strict=True):
            lengths = [examples.length(row) for row in rows]
            texts |= zip(rows, activations.to(self._model.device).split(lengths), strict=True)
        self._kept[examples] = [texts[row] for row in range(len(examples))]

    def keeps(self, examples: Examples) -> bool:
        return examples in self._kept

    @contextmanager
    def replayed(self, examples: Examples, rows: Sequence[int], batch: Mapping[str, Tensor]) -> Iterator[None]:
        """Passes inside take these rows' activations from what is kept, if it is; the rest of the model runs."""
        if examples not in self._kept or (self._model.peft.training and self.drops_out):
            yield
            return
        mask = batch["attention_mask"].bool()
        hidden = torch.zeros(*mask.shape, self.hidden, dtype=self.dtype, device=mask.device)
        hidden[mask] = torch.cat([self._kept[examples][row] for row in rows])
        before = [layer.__dict__.get("forward") for layer in self._frozen]
        for layer in self._frozen:
            layer.forward = lambda *_, **__: hidden
        try:
            yield
        finally:
            for layer, forward in zip(self._frozen, before, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward


def replayed(
    prefix: Prefix | None, examples: Examples, rows: Sequence[int], batch: Mapping[str, Tensor]
) -> AbstractContextManager[None]:
    """`Prefix.replayed`, where there is one."""
    return prefix.replayed(examples, rows, batch) if prefix else nullcontext()


def find_prefix(model: LoraModel, tokenizer: Any) -> Prefix | None:
    """The frozen layers that a model begins with; None where there are none, or where what they make of a text can't be
    kept: positions that depend on padding, layers that return more than one tensor.
    """
    base = model.peft.get_base_model()
    lists = [(name, module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList)]
    # What a user has chosen to train whole may lie anywhere, before the layers too.
    if not lists or tokenizer.padding_side != "right" or model.settings.modules_to_save is not None:
        return None
    name, layers = max(lists, key=lambda item: len(item[1]))
    inside = [module.removeprefix(f"{name}.") for module in model.shapes if module.startswith(f"{name}.")]
    if len(inside) < len(model.shapes):
        return None
    depth = min(int(module.split(".")[0]) for module in inside)
    if depth == 0:
        return None
    prefix = Prefix(model, tokenizer, layers, depth)
    try:
        prefix.compute(Examples([{"input_ids": [1, 1]}], [0]), [0])
    except (TypeError, AttributeError, IndexError):
        return None
    return prefix


def _drops_out(model: LoraModel, layers: nn.ModuleList, depth: int) -> bool:
    """Whether anything before the lowest adapter is random in training."""
    above = {id(module) for layer in list(layers)[depth:] for module in layer.modules()}
    heads = {id(module) for head in model.active_heads().values() for module in head.modules()}
    for module in model.peft.modules():
        if id(module) in above | heads:
            continue
        rates = [module.p] if isinstance(module, nn.Dropout) else [getattr(module, "attention_dropout", 0.0)]
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            return True
    return False
