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

from fedelta.learning.data import Examples
from fedelta.learning.model.lora_model import LoraModel
from fedelta.seeds import torch_seed

FILL_BATCH = 64
TRIALS = 3
"""Passes in training mode that must agree with evaluation before a cache counts as free of dropout."""


class _Reached(Exception):
    """The forward pass has come to where the cache ends."""


class ActivationCache:
    """The frozen layers that a model begins with, and their activations; made by `find_activation_cache`.

    Args:
        model: whose passes are shortened.
        tokenizer: pads on the right.
        frozen: the layers, each of which runs once a pass and returns one tensor.

    Attributes:
        drops_out: whether these layers are random in training; then they are kept for evaluation alone.
        hidden, dtype: width and type of what is kept of a token.
    """

    def __init__(self, model: LoraModel, tokenizer: Any, frozen: Sequence[nn.Module]) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._frozen = list(frozen)
        self._kept: WeakKeyDictionary[Examples, list[Tensor]] = WeakKeyDictionary()
        # Four short texts: with 5 % of dropout the odds that nothing drops are below 1e-100.
        probe = Examples([{"input_ids": [2, 3] * (2 + i)} for i in range(4)], [0] * 4)
        rows = list(range(len(probe)))
        found = self.compute(probe, rows)
        self.hidden, self.dtype = found.shape[1], found.dtype
        self.drops_out = _skips_layers(model) or any(
            not torch.equal(found, self.compute(probe, rows, seed)) for seed in range(TRIALS)
        )

    def bytes_of(self, examples: Examples) -> int:
        """What keeping these texts takes."""
        return sum(examples.lengths) * self.hidden * self.dtype.itemsize

    def batches(self, examples: Examples) -> list[list[int]]:
        """The rows in the batches that `compute` goes through."""
        return list(examples.evaluation_order(FILL_BATCH))

    @torch.no_grad()
    def compute(self, examples: Examples, rows: Sequence[int], training: int | None = None) -> Tensor:
        """Activations of one of `batches`: (tokens of all rows, hidden), row after row, without padding, on the CPU.

        Args:
            training: seed of a pass in training mode; None is evaluation.
        """
        batch = examples.batch(rows, self._tokenizer, self._model.device)
        found: list[Tensor] = []

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            found.append(output[batch["attention_mask"].bool()].cpu())
            raise _Reached

        hook = self._frozen[-1].register_forward_hook(stop)
        before = self._model.peft.training
        try:
            with torch_seed(training or 0, self._model.device):
                self._model.peft.train(training is not None)
                self._model.peft(**batch)
        except _Reached:
            pass
        finally:
            hook.remove()
            self._model.peft.train(before)
        return found[0]

    def keep(self, examples: Examples, batches: Sequence[Tensor]) -> None:
        """Take what `compute` gave for each of `batches`."""
        texts: dict[int, Tensor] = {}
        for rows, activations in zip(self.batches(examples), batches, strict=True):
            lengths = [examples.length(row) for row in rows]
            texts |= zip(rows, activations.to(self._model.device).split(lengths), strict=True)
        self._kept[examples] = [texts[row] for row in range(len(examples))]

    def fill(self, examples: Examples) -> None:
        """Compute and keep these."""
        self.keep(examples, [self.compute(examples, rows) for rows in self.batches(examples)])

    def keeps(self, examples: Examples) -> bool:
        return examples in self._kept

    @contextmanager
    def replay(self, examples: Examples, rows: Sequence[int], batch: Mapping[str, Tensor]) -> Iterator[None]:
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
    cache: ActivationCache | None, examples: Examples, rows: Sequence[int], batch: Mapping[str, Tensor]
) -> AbstractContextManager[None]:
    """`ActivationCache.replay`, where there is one."""
    return cache.replay(examples, rows, batch) if cache else nullcontext()


def find_activation_cache(model: LoraModel, tokenizer: Any) -> ActivationCache | None:
    """The frozen layers that a model begins with, or None.

    None where the lowest layer is adapted, where positions depend on padding, and for every model whose logits a trial
    finds changed: layers that share weights or run twice, that return more than a tensor, that look at other tokens.
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
    try:
        cache = ActivationCache(model, tokenizer, list(layers)[:depth])
        return cache if _same_logits(model, tokenizer, cache) else None
    except Exception:
        # A saving that this model does not offer is no error.
        return None


@torch.no_grad()
def _same_logits(model: LoraModel, tokenizer: Any, cache: ActivationCache) -> bool:
    """Whether the rest of the model does with kept activations what it does with fresh ones."""
    examples = Examples([{"input_ids": [2, 3, 5] * (1 + 2 * i)} for i in range(3)], [0] * 3)
    rows = [2, 0, 1]
    batch = examples.batch(rows, tokenizer, model.device)
    del batch["labels"]  # a language model has others
    before = model.peft.training
    try:
        model.peft.eval()
        plain = model.peft(**batch).logits.float()
        cache.fill(examples)
        with cache.replay(examples, rows, batch):
            mine = model.peft(**batch).logits.float()
    finally:
        model.peft.train(before)
    if plain.ndim == 3:
        # What a language model says of padding nobody reads.
        plain, mine = (logits[batch["attention_mask"].bool()] for logits in (plain, mine))
    rounding = 1e-4 if cache.dtype == torch.float32 else 3e-2
    return torch.allclose(mine, plain, rtol=rounding, atol=rounding * float(plain.abs().max()))


def _skips_layers(model: LoraModel) -> bool:
    """Whether whole layers are skipped at random in training, which a few trials might not show."""
    rates = (value for key, value in model.peft.config.to_dict().items() if "layerdrop" in key or "layer_drop" in key)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
