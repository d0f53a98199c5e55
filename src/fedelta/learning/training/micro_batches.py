"""Split of a batch into parts of similar text length, to save padding."""

from collections.abc import Callable, Sequence

import torch

PASS_OVERHEAD = {("cpu", torch.float32): 16, ("cpu", torch.bfloat16): 64}
"""Fixed cost of a pass, in tokens: the time of the work between matrix products."""

GPU_PASS_OVERHEAD = 8192


def split_by_length(
    rows: Sequence[int],
    length: Callable[[int], int],
    device: torch.device,
    dtype: torch.dtype,
    max_rows: int | None = None,
) -> list[list[int]]:
    """Split rows into parts at the minimum cost: padded tokens, plus a constant per part.

    Args:
        rows: rows of one optimizer step.
        length: function that returns the number of tokens in a row.
        device, dtype: device and type of the base, which determine the constant.
        max_rows: maximum number of rows in a part. None sets no limit.
    """
    cost = PASS_OVERHEAD.get((device.type, dtype), GPU_PASS_OVERHEAD)
    order = sorted(rows, key=lambda row: (length(row), row))
    max_rows = max_rows or len(order)
    # best[k] is the minimum cost of the first k rows; their last part begins at begin[k].
    best, begin = [0.0], [0]
    for k in range(1, len(order) + 1):
        longest = length(order[k - 1])
        options = {j: best[j] + cost + (k - j) * longest for j in range(max(0, k - max_rows), k)}
        begin.append(min(options, key=options.__getitem__))
        best.append(options[begin[k]])
    parts = []
    end = len(order)
    while end:
        parts.append(order[begin[end] : end])
        end = begin[end]
    return parts[::-1]
