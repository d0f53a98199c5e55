"""Tokenized texts with labels, and batches of them padded to their longest text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

IGNORED = -100
"""Label of a token that has no part in the loss."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts as token ids, tokenized once.

    Args:
        features: one dict for each text with `input_ids` and, where the model uses them, `token_type_ids`.
        labels: of each text: a class index, a number, or a label for each of its tokens.
    """

    features: Sequence[dict[str, list[int]]]
    labels: Sequence[Any]

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

    def weight(self, indices: Sequence[int]) -> int:
        """What the loss of these texts is a mean over: texts, or those tokens that are predicted."""
        if not indices or not isinstance(self.labels[indices[0]], list):
            return len(indices)
        # The first token of a text is predicted from nothing.
        return sum(label != IGNORED for i in indices for label in self.labels[i][1:])

    def batch(self, indices: Sequence[int], tokenizer: Any, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """These texts, padded to the longest of them."""
        rows = [{**self.features[i], "labels": self.labels[i]} for i in indices]
        by_token = bool(rows) and isinstance(rows[0]["labels"], list)
        collate = DataCollatorForSeq2Seq(tokenizer) if by_token else DataCollatorWithPadding(tokenizer)
        return {key: tensor.to(device) for key, tensor in collate(rows).items()}

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


@dataclass(frozen=True, eq=False)
class Completions(Examples):
    """Prompts that are to be completed.

    Args:
        labels: for each token itself where it is of the completion, else `IGNORED`.
        prompts: the tokens that an answer is generated from.
        references: the completion of each text, as text.
        groups: texts of one group share their prompt: one answer to it is compared with all their references.
        kinds: of which each text is, where answers are counted by kind; else empty.
    """

    prompts: Sequence[list[int]]
    references: Sequence[str]
    groups: Sequence[str]
    kinds: Sequence[str] = ()

    def select(self, indices: Sequence[int]) -> "Completions":
        plain = super().select(indices)
        prompts = [self.prompts[i] for i in indices]
        references, groups = ([values[i] for i in indices] for values in (self.references, self.groups))
        kinds = [self.kinds[i] for i in indices] if self.kinds else ()
        return Completions(plain.features, plain.labels, prompts, references, groups, kinds)

    @property
    def by_group(self) -> list[list[int]]:
        """The rows of each group, in the order in which groups first come."""
        return rows_by_value(self.groups)


def rows_by_value(values: Sequence[Any]) -> list[list[int]]:
    """The rows of each value, in the order in which values first come; values are told apart as text."""
    found: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        found.setdefault(str(value), []).append(row)
    return list(found.values())


def tokenize(split: Any, columns: Sequence[str], tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    """The texts, or pairs of texts, of a `datasets.Dataset` as features, cut to a length."""
    texts = [split[column][:] for column in columns]
    encoded = tokenizer(*texts, truncation=True, max_length=length, return_attention_mask=False)
    return [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]
