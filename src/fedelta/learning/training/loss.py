"""Loss of texts. The form of the labels decides which: classes, numbers, or one label per token."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from fedelta.learning.data.examples import IGNORED


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the summed loss of each text, and the number of terms in each sum.

    Args:
        logits: (texts, classes), (texts, 1) for numbers, or (texts, tokens, vocabulary).
        labels: (texts,) of integers, (texts,) of floats, or (texts, tokens) with `IGNORED` for tokens that don't count.

    Returns:
        (texts,) sums, and (texts,) counts: 1, or the number of predicted tokens.
    """
    if labels.ndim == 2:
        # The logits at a token predict the next one.
        targets = labels[:, 1:]
        losses = cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
        return losses.sum(1), (targets != IGNORED).sum(1)
    if labels.is_floating_point():
        return mse_loss(logits[:, 0], labels, reduction="none"), torch.ones(len(labels), dtype=torch.long)
    return cross_entropy(logits, labels, reduction="none"), torch.ones(len(labels), dtype=torch.long)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean loss of these texts, which a step reduces."""
    if labels.ndim == 1 and not labels.is_floating_point():
        return cross_entropy(logits, labels)
    losses, counts = row_losses(logits, labels)
    return losses.sum() / counts.sum().to(losses.device)
