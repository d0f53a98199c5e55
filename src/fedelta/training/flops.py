"""What training and evaluation have to multiply, and how fast this machine multiplies: the limit of a run."""

import time
from typing import Any, NamedTuple

import torch

from fedelta.data import Examples
from fedelta.model import LoraModel

LENGTHS = (16, 32)
"""Tokens of the two texts from which the cost of every other length follows."""


class TextCost(NamedTuple):
    """FLOPs of one text of L tokens without padding: linear·L + square·L²."""

    linear: float
    square: float

    def of(self, tokens: float, squares: float) -> float:
        """FLOPs of texts with this Σ L and this Σ L²."""
        return self.linear * tokens + self.square * squares


def text_cost(model: LoraModel, tokenizer: Any, training: bool) -> TextCost:
    """What the loaded model multiplies for a text, forward and, in training, backward; counted by torch.

    Torch does not count attention scores on every CPU; for short texts they are a few percent.
    """
    from torch.utils.flop_counter import FlopCounterMode

    found = []
    for length in LENGTHS:
        token = tokenizer.pad_token_id + 1 if tokenizer.pad_token_id is not None else 1
        batch = Examples([{"input_ids": [token] * length}], [0]).batch([0], tokenizer, model.device)
        with FlopCounterMode(display=False) as counter, torch.random.fork_rng(devices=[]):
            model.peft.train(training)
            with torch.set_grad_enabled(training):
                loss = model.peft(**batch).loss
                if training:
                    loss.backward()
                    model.peft.zero_grad()
        found.append(float(counter.get_total_flops()))
    (short, long), (few, many) = found, LENGTHS
    square = (long / many - short / few) / (many - few)
    return TextCost(short / few - square * few, square)


def gemm_rate(dtype: torch.dtype, device: torch.device, size: int = 1024) -> float:
    """FLOP/s of one square product, the best of some."""
    X = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        X @ X
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
