"""Source, task and partition put together: what a federation trains and is judged on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedelta.errors import FedeltaError, quantity
from fedelta.learning.data.examples import Examples
from fedelta.learning.data.partition import PartitionSettings, partition
from fedelta.learning.data.sources import DataSettings, load_rows, load_splits
from fedelta.learning.tasks import Task
from fedelta.seeds import derive_seed


@dataclass(frozen=True, eq=False)
class Shard:
    """One client's rows: those it trains on, and those it holds out for its own validation loss."""

    train: Examples
    validation: Examples

    @property
    def cost(self) -> float:
        """What a local epoch costs, in tokens."""
        return float(sum(self.train.lengths))


@dataclass(frozen=True, eq=False)
class FederatedData:
    """Everything a run reads.

    Args:
        shards: client id → its rows.
        validation, test: the server's; never seen in training.
        classes: name of each class index; empty where the task has no classes.
    """

    shards: Mapping[str, Shard]
    validation: Examples
    test: Examples
    classes: list[str]


@dataclass(frozen=True, eq=False)
class TokenizedSplits:
    """Tokenized splits before they are shared out: the same for every seed and method."""

    train: Examples
    validation: Examples
    test: Examples
    classes: list[str]
    rows: Any


def read_splits(settings: DataSettings, task: Task) -> tuple[dict[str, Any], list[str]]:
    """The splits, and the names of their classes, if the task is about classes.

    Raises:
        FedeltaError: if the data are not there, or not what the task needs.
    """
    splits = load_splits(settings, task.columns(settings), task.together)
    return splits, task.classes(settings, splits)


def tokenize_splits(
    settings: DataSettings, task: Task, splits: dict[str, Any], classes: list[str], tokenizer: Any
) -> TokenizedSplits:
    """Tokenize each split, once."""
    examples = {name: task.examples(split, settings, classes, tokenizer) for name, split in splits.items()}
    return TokenizedSplits(**examples, classes=classes, rows=splits["train"])


def build_data(
    tokenized: TokenizedSplits, settings: DataSettings, sharing: PartitionSettings, seed: int
) -> FederatedData:
    """Share the training rows out to clients, each with its own held-out part.

    Raises:
        FedeltaError: if a client has too few rows to hold some out and train on the others.
    """
    shards = {}
    parts = partition(tokenized.rows, list(tokenized.train.labels), sharing, seed)
    for client, rows in zip(client_names(len(parts)), parts, strict=True):
        shards[client] = _shard(tokenized.train, rows, client, settings.client_validation, seed)
    return FederatedData(shards, tokenized.validation, tokenized.test, tokenized.classes)


def client_names(clients: int) -> list[str]:
    """Of so many clients, in the order of the partition, which is that of the alphabet."""
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
    """A site's own rows, all of them, with the classes that the server has.

    Raises:
        FedeltaError: if the rows can't be read, or one has a label that the server does not know.
    """
    examples = task.examples(load_rows(settings, task.columns(settings)), settings, classes, tokenizer)
    return _shard(examples, range(len(examples)), client, settings.client_validation, seed)
