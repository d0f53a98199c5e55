"""The data of a federation: a source, tokenized for a task and divided among clients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedelta.errors import FedeltaError, quantity
from fedelta.learning.data.cells import RefusedRow
from fedelta.learning.data.examples import Examples
from fedelta.learning.data.partition import PartitionSettings, partition
from fedelta.learning.data.settings import DataSettings
from fedelta.learning.data.sources import find_place, load_rows, load_splits
from fedelta.learning.data.table import listed, say
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
    """Tokenize each split.

    Raises:
        FedeltaError: naming the first row that can't become tokens, with its file and line.
    """
    examples = {name: _examples(settings, task, name, split, classes, tokenizer) for name, split in splits.items()}
    return TokenizedSplits(**examples, classes=classes, rows=splits["train"])


def _examples(
    settings: DataSettings, task: Task, name: str, split: Any, classes: Sequence[str], tokenizer: Any
) -> Examples:
    """The tokens of one split."""
    try:
        return task.examples(split, settings, classes, tokenizer)
    except RefusedRow as error:
        place = find_place(settings, task.columns(settings), split[error.row])
        raise FedeltaError(f"{place or f'row {error.row + 1}'} of {name}: {error.reason}") from error


def build_data(
    tokenized: TokenizedSplits, settings: DataSettings, sharing: PartitionSettings, seed: int
) -> FederatedData:
    """Divide the training rows among clients, and hold out a part of the rows of each.

    Raises:
        FedeltaError: if the rows can't be divided as configured.
    """
    shards = {}
    # Only classes decide where a row goes. A row of a language model may be several texts, with a label for each token.
    labels = list(tokenized.train.labels) if tokenized.classes else [0] * tokenized.rows.num_rows
    parts = partition(tokenized.rows, labels, sharing, seed)
    for client, rows in parts.items():
        shards[client] = _shard(tokenized.train, rows, client, settings.client_validation, seed)
    single = [client for client, rows in parts.items() if len(rows) == 1]
    if single and settings.client_validation > 0:
        say(
            f"data.client_validation: {quantity(len(single), 'client')} with one row hold none out: {listed(single, 3)}"
        )
    return FederatedData(shards, tokenized.validation, tokenized.test, tokenized.classes)


def _shard(examples: Examples, rows: Sequence[int], client: str, share: float, seed: int) -> Shard:
    """A client's rows. It keeps at least one row to train on, so a client with a single row holds none out."""
    held = min(max(1, round(share * len(rows))), len(rows) - 1) if share > 0 else 0
    order = np.random.default_rng(derive_seed(seed, "held out", client)).permutation(rows).tolist()
    return Shard(examples.of_rows(sorted(order[held:])), examples.of_rows(sorted(order[:held])))


def build_shard(
    settings: DataSettings, task: Task, classes: Sequence[str], tokenizer: Any, client: str, seed: int
) -> Shard:
    """Load all rows of a site, labeled with the server's classes.

    Raises:
        FedeltaError: if the rows can't be read, or one has a label that the server does not know.
    """
    rows = load_rows(settings, task.columns(settings))
    examples = _examples(settings, task, "train", rows, classes, tokenizer)
    return _shard(examples, range(rows.num_rows), client, settings.client_validation, seed)
