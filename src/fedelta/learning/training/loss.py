"""The loss of texts, told by the form of their labels: classes, numbers, or one for each token."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from fedelta.learning.data.examples import IGNORED


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of each text, and what it is a sum over.

    Args:
        logits: (texts, classes), (texts, 1) for numbers, or (texts, tokens, vocabulary).
        labels: (texts,) of whole numbers, (texts,) of floats, or (texts, tokens) with `IGNORED` where none counts.

    Returns:
        (texts,) sums, and (texts,) counts: 1, or the predicted tokens.
    """
    if labels.ndim == 2:
        # Logits are of the token after.
        targets = labels[:, 1:]
        losses = cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
        return losses.sum(1), (targets != IGNORED).sum(1)
    if labels.is_floating_point():
        return mse_loss(logits[:, 0], labels, reduction="none"), torch.ones(len(labels), dtype=torch.long)
    return cross_entropy(logits, labels, reduction="none"), torch.ones(len(labels), dtype=torch.long)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of these texts: what a step goes down."""
    if labels.ndim == 1 and not labels.is_floating_point():
        return cross_entropy(logits, labels)
    losses, counts = row_losses(logits, labels)
    return losses.sum() / counts.sum().to(losses.device)
