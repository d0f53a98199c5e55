"""Every random choice of a run comes from its seed and the name of its purpose, never from a global.

A choice therefore depends on what it is for and on nothing that ran before it: a resumed run makes the
same choices, and so does a client that is asked alone.
"""

import zlib

import numpy as np


def derive_seed(seed: int, purpose: str, *indices: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. `derive_seed(0, "train", round, client)`."""
    words = [zlib.crc32(str(part).encode()) for part in (purpose, *indices)]
    high, low = np.random.SeedSequence([seed, *words]).generate_state(2, np.uint32)
    return (int(high) << 32 | int(low)) >> 1
