"""Every random choice of a run comes from its seed and the name of its purpose, never from a global.

A choice therefore depends on what it is for and on nothing that ran before it: a resumed run makes the
same choices, and so does a client that is asked alone.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *indices: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. `derive_seed(0, "train", round, client)`."""
    words = [zlib.crc32(str(part).encode()) for part in (purpose, *indices)]
    high, low = np.random.SeedSequence([seed, *words]).generate_state(2, np.uint32)
    return (int(high) << 32 | int(low)) >> 1


@contextmanager
def torch_seed(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generators for what runs inside, and restore those of the CPU and of `device` afterwards.

    Dropout and the initialization of layers draw from a global generator; inside, they depend on the seed alone.
    """
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
