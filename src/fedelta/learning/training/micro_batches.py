"""A batch as parts of like length, so that little is padded."""

from collections.abc import Callable, Sequence

import torch

PASS_TOKENS = {("cpu", torch.float32): 16, ("cpu", torch.bfloat16): 64}
"""What a pass costs beside its tokens, in tokens: the steps between which nothing is multiplied."""

PASS_TOKENS_OF_A_GPU = 8192


def like_lengths(
    rows: Sequence[int], length: Callable[[int], int], device: torch.device, dtype: torch.dtype, most: int | None = None
) -> list[list[int]]:
    """These rows in parts whose padded tokens, with a constant for each part, are the fewest.

    Args:
        rows: of one optimizer step.
        length: tokens of a row.
        device, dtype: of the base; they decide what a part costs.
        most: rows in a part at most; None takes as many as there are.
    """
    cost = PASS_TOKENS.get((device.type, dtype), PASS_TOKENS_OF_A_GPU)
    order = sorted(rows, key=lambda row: (length(row), row))
    most = most or len(order)
    # best[k]: the least cost of the first k rows, whose last part begins at begin[k].
    best, begin = [0.0], [0]
    for k in range(1, len(order) + 1):
        longest = length(order[k - 1])
        options = {j: best[j] + cost + (k - j) * longest for j in range(max(0, k - most), k)}
        begin.append(min(options, key=options.__getitem__))
        best.append(options[begin[k]])
    parts = []
    end = len(order)
    while end:
        parts.append(order[begin[end] : end])
        end = begin[end]
    return parts[::-1]
