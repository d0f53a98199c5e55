"""Cache of the activations that leave the frozen layers below the lowest adapter.

No trained parameter and no patch ever reaches those layers, so their output for a text is the same in every round.
It is cached for a whole set of texts or not at all. The batches that compute it depend only on that set, so that a
client's training never depends on which clients trained before it.
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
"""Texts in a batch that fills the cache."""
DROPOUT_TRIALS = 3
"""Passes in training mode that must agree with evaluation before layers count as free of dropout."""


class _EndOfFrozenLayers(Exception):
    """Stops a forward pass after the last frozen layer."""


class ActivationCache:
    """The frozen layers at the start of a model, with their activations. `find_activation_cache` creates it.

    Args:
        model: model whose passes skip these layers.
        tokenizer: its tokenizer, which must pad on the right.
        frozen: the layers. Each must run once per pass and return one tensor.

    Attributes:
        drops_out: True if these layers are random in training. Their activations then serve evaluation only.
        hidden, dtype: width and type of the cached activation of a token.
    """

    def __init__(self, model: LoraModel, tokenizer: Any, frozen: Sequence[nn.Module]) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._frozen = list(frozen)
        self._cached: WeakKeyDictionary[Examples, list[Tensor]] = WeakKeyDictionary()
        # Four short texts: at 5 % dropout, the odds that nothing is dropped are below 1e-100.
        probe = Examples([{"input_ids": [2, 3] * (2 + i)} for i in range(4)], [0] * 4)
        rows = list(range(len(probe)))
        activations = self.compute(probe, rows)
        self.hidden, self.dtype = activations.shape[1], activations.dtype
        self.drops_out = _skips_layers(model) or any(
            not torch.equal(activations, self.compute(probe, rows, seed)) for seed in range(DROPOUT_TRIALS)
        )

    def bytes_of(self, examples: Examples) -> int:
        """Bytes that the activations of these texts take."""
        return sum(examples.lengths) * self.hidden * self.dtype.itemsize

    def batches(self, examples: Examples) -> list[list[int]]:
        """Rows of each batch with which `compute` fills the cache."""
        return list(examples.evaluation_order(FILL_BATCH))

    @torch.no_grad()
    def compute(self, examples: Examples, rows: Sequence[int], training: int | None = None) -> Tensor:
        """Compute the activations of one of `batches`.

        Args:
            training: seed of a pass in training mode. None means evaluation mode.

        Returns:
            (tokens of all rows, hidden) on the CPU, row after row, without padding.
        """
        batch = examples.batch(rows, self._tokenizer, self._model.device)
        activations: list[Tensor] = []

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            activations.append(output[batch["attention_mask"].bool()].cpu())
            raise _EndOfFrozenLayers

        hook = self._frozen[-1].register_forward_hook(stop)
        before = self._model.peft.training
        try:
            with torch_seed(training or 0, self._model.device):
                self._model.peft.train(training is not None)
                self._model.peft(**batch)
        except _EndOfFrozenLayers:
            pass
        finally:
            hook.remove()
            self._model.peft.train(before)
        return activations[0]

    def keep(self, examples: Examples, batches: Sequence[Tensor]) -> None:
        """Cache the activations of all texts, as `compute` returned them for each of `batches`."""
        texts: dict[int, Tensor] = {}
        for rows, activations in zip(self.batches(examples), batches, strict=True):
            lengths = [examples.length(row) for row in rows]
            texts |= zip(rows, activations.to(self._model.device).split(lengths), strict=True)
        self._cached[examples] = [texts[row] for row in range(len(examples))]

    def fill(self, examples: Examples) -> None:
        """Compute and cache the activations of all texts."""
        self.keep(examples, [self.compute(examples, rows) for rows in self.batches(examples)])

    def keeps(self, examples: Examples) -> bool:
        """Tell whether the activations of these texts are cached."""
        return examples in self._cached

    @contextmanager
    def replay(self, examples: Examples, rows: Sequence[int], batch: Mapping[str, Tensor]) -> Iterator[None]:
        """Context in which passes over these rows take their activations from the cache, if they are cached.

        The layers above the frozen ones run as usual.
        """
        if examples not in self._cached or (self._model.peft.training and self.drops_out):
            yield
            return
        mask = batch["attention_mask"].bool()
        hidden = torch.zeros(*mask.shape, self.hidden, dtype=self.dtype, device=mask.device)
        hidden[mask] = torch.cat([self._cached[examples][row] for row in rows])
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
    """`ActivationCache.replay` if there is a cache, else a context that does nothing."""
    return cache.replay(examples, rows, batch) if cache else nullcontext()


def find_activation_cache(model: LoraModel, tokenizer: Any) -> ActivationCache | None:
    """Find the frozen layers at the start of a model, or return None if they can't be cached.

    They can't if the lowest layer is adapted, if positions depend on padding, or if a trial shows that a cache would
    change the logits: layers may share weights, run twice, return more than one tensor, or read other tokens.
    """
    base = model.peft.get_base_model()
    lists = [(name, module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList)]
    # Modules that a user chose to train may be anywhere, even before the layers.
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
        # The cache is only an optimization, so a model without it is not an error.
        return None


@torch.no_grad()
def _same_logits(model: LoraModel, tokenizer: Any, cache: ActivationCache) -> bool:
    """Tell whether the model gives the same logits with cached activations as without."""
    examples = Examples([{"input_ids": [2, 3, 5] * (1 + 2 * i)} for i in range(3)], [0] * 3)
    rows = [2, 0, 1]
    batch = examples.batch(rows, tokenizer, model.device)
    del batch["labels"]  # A language model needs one per token.
    before = model.peft.training
    try:
        model.peft.eval()
        plain = model.peft(**batch).logits.float()
        cache.fill(examples)
        with cache.replay(examples, rows, batch):
            cached = model.peft(**batch).logits.float()
    finally:
        model.peft.train(before)
    if plain.ndim == 3:
        # The logits of a language model at padding tokens are never used.
        plain, cached = (logits[batch["attention_mask"].bool()] for logits in (plain, cached))
    rounding = 1e-4 if cache.dtype == torch.float32 else 3e-2
    return torch.allclose(cached, plain, rtol=rounding, atol=rounding * float(plain.abs().max()))


def _skips_layers(model: LoraModel) -> bool:
    """Tell whether training skips whole layers at random, which a few trials might not reveal."""
    rates = (value for key, value in model.peft.config.to_dict().items() if "layerdrop" in key or "layer_drop" in key)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
