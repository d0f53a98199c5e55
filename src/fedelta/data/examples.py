"""Tokenised texts with labels, and batches of them padded to their longest text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts as token ids, tokenised once.

    Args:
        features: one dict for each text with `input_ids` and, where the model uses them, `token_type_ids`.
        labels: class index of each text.
    """

    features: Sequence[dict[str, list[int]]]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Sequence[int]) -> "Examples":
        return Examples([self.features[i] for i in indices], [self.labels[i] for i in indices])

    def length(self, index: int) -> int:
        """Tokens of a text."""
        return len(self.features[index]["input_ids"])

    @property
    def lengths(self) -> list[int]:
        return [self.length(i) for i in range(len(self))]

    def batch(self, indices: Sequence[int], tokenizer: Any, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """These texts, padded to the longest of them."""
        rows = [{**self.features[i], "labels": self.labels[i]} for i in indices]
        return {key: tensor.to(device) for key, tensor in DataCollatorWithPadding(tokenizer)(rows).items()}

    def training_order(self, batch_size: int, seed: int) -> Iterator[list[int]]:
        """One epoch of batches, shuffled."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]

    def evaluation_order(self, batch_size: int) -> Iterator[list[int]]:
        """All texts once, sorted by length: the fewest padding tokens."""
        order = sorted(range(len(self)), key=self.length)
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


def tokenise(
    split: Any, columns: Sequence[str], label: str, classes: Sequence[Any], tokenizer: Any, length: int
) -> Examples:
    """A `datasets.Dataset` as `Examples`; labels become their index in `classes`."""
    index = {value: i for i, value in enumerate(classes)}
    texts = [split[column][:] for column in columns]
    encoded = tokenizer(*texts, truncation=True, max_length=length, return_attention_mask=False)
    features = [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]
    return Examples(features, [index[value] for value in split[label][:]])
