"""Seeds of all random choices, derived from the run's seed and the purpose of the choice, never from a global.

A choice therefore does not depend on what ran before it. A resumed run makes the same choices as an uninterrupted
one, and a client makes the same choices whether it runs alone or with others.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *indices: int | str) -> int:
    """Return a 63-bit seed for one purpose, e.g. `derive_seed(0, "train", round, client)`."""
    words = [zlib.crc32(str(part).encode()) for part in (purpose, *indices)]
    high, low = np.random.SeedSequence([seed, *words]).generate_state(2, np.uint32)
    return (int(high) << 32 | int(low)) >> 1


@contextmanager
def torch_seed(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generators for a block, then restore the generators of the CPU and of `device`.

    Dropout and layer initialization draw from a global generator. Inside the block they depend only on the seed.

    Args:
        seed: the seed of all generators inside the block.
        device: a CUDA device whose generator is restored as well; None or a CPU device restores the CPU's alone.
    """
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
