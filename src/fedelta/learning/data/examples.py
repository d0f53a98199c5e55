"""Tokenized texts with labels, and their batches, padded to the longest text in each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

IGNORED = -100
"""Label of a token that does not count in the loss."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts as token ids, tokenized once.

    Args:
        features: one dict per text with `input_ids` and, if the model uses them, `token_type_ids`.
        labels: one label per text: a class index, a number, or a list with one label per token.
    """

    features: Sequence[dict[str, list[int]]]
    labels: Sequence[Any]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Sequence[int]) -> "Examples":
        return Examples([self.features[i] for i in indices], [self.labels[i] for i in indices])

    def of_rows(self, rows: Sequence[int]) -> "Examples":
        """All texts of these rows of the data, in the order of the rows."""
        return self.select(rows)

    @property
    def row_count(self) -> int:
        """Number of rows of the data that the texts belong to. A row is one text unless a chat template splits it."""
        return len(self)

    def length(self, index: int) -> int:
        """Number of tokens in one text."""
        return len(self.features[index]["input_ids"])

    @property
    def lengths(self) -> list[int]:
        return [self.length(i) for i in range(len(self))]

    def weight(self, indices: Sequence[int]) -> int:
        """Number of terms in the mean loss of these texts: the texts, or the tokens that are predicted."""
        if not indices or not isinstance(self.labels[indices[0]], list):
            return len(indices)
        # No token precedes the first one, so it is not predicted.
        return sum(label != IGNORED for i in indices for label in self.labels[i][1:])

    def batch(self, indices: Sequence[int], tokenizer: Any, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Collate these texts into tensors, padded to the longest of them."""
        rows = [{**self.features[i], "labels": self.labels[i]} for i in indices]
        by_token = bool(rows) and isinstance(rows[0]["labels"], list)
        collate = DataCollatorForSeq2Seq(tokenizer) if by_token else DataCollatorWithPadding(tokenizer)
        return {key: tensor.to(device) for key, tensor in collate(rows).items()}

    def training_order(self, batch_size: int, seed: int) -> Iterator[list[int]]:
        """Yield the row indices of each batch of one shuffled epoch."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]

    def evaluation_order(self, batch_size: int) -> Iterator[list[int]]:
        """Yield the row indices of each batch, every text once, sorted by length to save padding."""
        order = sorted(range(len(self)), key=self.length)
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


@dataclass(frozen=True, eq=False)
class Completions(Examples):
    """Prompts with their completions.

    Args:
        labels: for each token, its own id if it belongs to the completion, else `IGNORED`.
        prompts: tokens from which an answer is generated, one list per text.
        references: completion of each text, as a string.
        groups: group of each text. Texts in a group share a prompt, and its one answer is compared with the
            references of all of them.
        kinds: kind of each text if answers are counted by kind, else empty.
        rows: row of the data that each text belongs to; empty if each row is one text. Texts of a row stay together
            wherever rows are drawn, and have the same prompt, reference, group and kind.
    """

    prompts: Sequence[list[int]]
    references: Sequence[str]
    groups: Sequence[str]
    kinds: Sequence[str] = ()
    rows: Sequence[int] = ()

    def select(self, indices: Sequence[int]) -> "Completions":
        plain = super().select(indices)
        prompts = [self.prompts[i] for i in indices]
        references, groups = ([values[i] for i in indices] for values in (self.references, self.groups))
        kinds = [self.kinds[i] for i in indices] if self.kinds else ()
        rows = [self.rows[i] for i in indices] if self.rows else ()
        return Completions(plain.features, plain.labels, prompts, references, groups, kinds, rows)

    def of_rows(self, rows: Sequence[int]) -> "Completions":
        if not self.rows:
            return self.select(rows)
        return self.select([text for row in rows for text in self._texts_of_row[row]])

    @property
    def row_count(self) -> int:
        return len(self._texts_of_row) if self.rows else len(self)

    @cached_property
    def _texts_of_row(self) -> dict[int, list[int]]:
        """Row → its texts. Kept, because every client of a partition selects its rows."""
        texts: dict[int, list[int]] = {}
        for text, row in enumerate(self.rows):
            texts.setdefault(row, []).append(text)
        return texts

    @property
    def by_group(self) -> list[list[int]]:
        """Texts of each group, one of each row, in the order in which the groups first occur."""
        first = list(
            dict(zip(reversed(self.rows or range(len(self))), reversed(range(len(self))), strict=True)).values()
        )
        first.sort()
        return [[first[i] for i in group] for group in rows_by_value([self.groups[i] for i in first])]


def rows_by_value(values: Sequence[Any]) -> list[list[int]]:
    """Rows of each value, in the order in which the values first occur. Values are compared as strings."""
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        rows.setdefault(str(value), []).append(row)
    return list(rows.values())


def tokenize(split: Any, columns: Sequence[str], tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    """Tokenize the texts, or pairs of texts, of a `datasets.Dataset`, truncated to `length` tokens."""
    texts = [split[column][:] for column in columns]
    encoded = tokenizer(*texts, truncation=True, max_length=length, return_attention_mask=False)
    return [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]
