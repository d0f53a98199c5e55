"""FLOPs of training and evaluation, and the FLOP rate of this machine, which together bound the speed of a run."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fedelta.learning.data import Examples
from fedelta.learning.device import synchronize
from fedelta.learning.model.activation_cache import ActivationCache, replayed
from fedelta.learning.model.lora_model import LoraModel
from fedelta.seeds import torch_seed

PROBE_LENGTHS = (8, 16, 32)
"""Tokens of the three texts whose measured cost determines that of every other length."""


def count_texts(lengths: Sequence[int]) -> dict[str, int]:
    """Count the quantities on which the cost of texts depends: `texts`, `tokens` Σ L and `squares` Σ L²."""
    return {"texts": len(lengths), "tokens": sum(lengths), "squares": sum(length**2 for length in lengths)}


class TextCost(NamedTuple):
    """Cost of a text of L tokens without padding, in FLOPs: constant + linear·L + square·L²."""

    constant: float
    linear: float
    square: float

    def of(self, counts: Mapping[str, int]) -> float:
        """FLOPs of the texts that `count_texts` counted."""
        return self.constant * counts["texts"] + self.linear * counts["tokens"] + self.square * counts["squares"]


def text_cost(model: LoraModel, tokenizer: Any, training: bool, cache: ActivationCache | None = None) -> TextCost:
    """Measure the FLOPs of the loaded model per text with torch's counter: forward and, in training, backward.

    torch does not count attention scores on every CPU. For short texts they are a few percent of the total.

    Args:
        model: model with an adapter loaded.
        tokenizer: the model's tokenizer.
        training: True to include the backward pass.
        cache: cache whose layers are not counted.
    """
    from torch.utils.flop_counter import FlopCounterMode

    measured = []
    for length in PROBE_LENGTHS:
        token = tokenizer.pad_token_id + 1 if tokenizer.pad_token_id is not None else 1
        label = [token] * length if model.task_type == "CAUSAL_LM" else 0
        text = Examples([{"input_ids": [token] * length}], [label])
        batch = text.batch([0], tokenizer, model.device)
        if cache:
            cache.fill(text)
        with FlopCounterMode(display=False) as counter, torch_seed(0, model.device):
            model.peft.train(training)
            with torch.set_grad_enabled(training), replayed(cache, text, [0], batch):
                loss = model.peft(**batch).loss
                if training:
                    loss.backward()
                    model.peft.zero_grad()
        measured.append(float(counter.get_total_flops()))
    powers = torch.tensor([[1, length, length**2] for length in PROBE_LENGTHS], dtype=torch.float64)
    return TextCost(*torch.linalg.solve(powers, torch.tensor(measured, dtype=torch.float64)).tolist())


def gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the FLOP/s of a square matrix product that is large enough to fill the device: the best of eight."""
    size = 8192 if device.type == "cuda" else 1024
    X = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(8):
        synchronize(device)
        begin = time.perf_counter()
        X @ X
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
