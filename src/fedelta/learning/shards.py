"""The data of a federation: a source, tokenized for a task and divided among clients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedelta.errors import FedeltaError, quantity
from fedelta.learning.data.examples import Examples
from fedelta.learning.data.partition import PartitionSettings, partition
from fedelta.learning.data.settings import DataSettings
from fedelta.learning.data.sources import load_rows, load_splits
from fedelta.learning.tasks import Task
from fedelta.seeds import derive_seed


@dataclass(frozen=True, eq=False)
class Shard:
    """One client's rows: its training rows, and the rows that it holds out for its own validation loss."""

    train: Examples
    validation: Examples

    @property
    def cost(self) -> float:
        """Cost of a local epoch, in tokens."""
        return float(sum(self.train.lengths))


@dataclass(frozen=True, eq=False)
class FederatedData:
    """All data of a run.

    Args:
        shards: client id → its rows.
        validation, test: the server's rows, which no client trains on.
        classes: name of each class, by index. Empty if the task has no classes.
    """

    shards: Mapping[str, Shard]
    validation: Examples
    test: Examples
    classes: list[str]


@dataclass(frozen=True, eq=False)
class TokenizedSplits:
    """Tokenized splits before the partition: the same for every seed and method."""

    train: Examples
    validation: Examples
    test: Examples
    classes: list[str]
    rows: Any


def read_splits(settings: DataSettings, task: Task) -> tuple[dict[str, Any], list[str]]:
    """Load the splits, and the names of their classes (empty if the task has no classes).

    Raises:
        FedeltaError: if the data are missing, or do not fit the task.
    """
    splits = load_splits(settings, task.columns(settings), task.together)
    return splits, task.classes(settings, splits)


def tokenize_splits(
    settings: DataSettings, task: Task, splits: dict[str, Any], classes: list[str], tokenizer: Any
) -> TokenizedSplits:
    """Tokenize each split."""
    examples = {name: task.examples(split, settings, classes, tokenizer) for name, split in splits.items()}
    return TokenizedSplits(**examples, classes=classes, rows=splits["train"])


def build_data(
    tokenized: TokenizedSplits, settings: DataSettings, sharing: PartitionSettings, seed: int
) -> FederatedData:
    """Divide the training rows among clients, and hold out a part of the rows of each.

    Raises:
        FedeltaError: if a client has too few rows to hold some out and train on the rest.
    """
    shards = {}
    parts = partition(tokenized.rows, list(tokenized.train.labels), sharing, seed)
    for client, rows in zip(client_names(len(parts)), parts, strict=True):
        shards[client] = _shard(tokenized.train, rows, client, settings.client_validation, seed)
    return FederatedData(shards, tokenized.validation, tokenized.test, tokenized.classes)


def client_names(clients: int) -> list[str]:
    """Names of all clients in the order of the partition, which is also alphabetical."""
    digits = max(3, len(str(clients - 1)))
    return [f"client-{i:0{digits}d}" for i in range(clients)]


def _shard(examples: Examples, rows: Sequence[int], client: str, share: float, seed: int) -> Shard:
    held = 0
    if share > 0:
        held = max(1, round(share * len(rows)))
        if held >= len(rows):
            size = quantity(len(rows), "row")
            raise FedeltaError(f"{client} has {size}, too few to hold out {held} and train on the rest")
    order = np.random.default_rng(derive_seed(seed, "held out", client)).permutation(rows).tolist()
    return Shard(examples.select(sorted(order[held:])), examples.select(sorted(order[:held])))


def build_shard(
    settings: DataSettings, task: Task, classes: Sequence[str], tokenizer: Any, client: str, seed: int
) -> Shard:
    """Load all rows of a site, labeled with the server's classes.

    Raises:
        FedeltaError: if the rows can't be read, or one has a label that the server does not know.
    """
    examples = task.examples(load_rows(settings, task.columns(settings)), settings, classes, tokenizer)
    return _shard(examples, range(len(examples)), client, settings.client_validation, seed)
