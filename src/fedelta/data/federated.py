"""Put together: source, tokens and partition as what a federation trains and is judged on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedelta.data.examples import Examples, tokenise
from fedelta.data.partition import PartitionSettings, partition
from fedelta.data.sources import DataSettings, load_rows, load_splits
from fedelta.errors import FedeltaError
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
        classes: label of each class index.
    """

    shards: Mapping[str, Shard]
    validation: Examples
    test: Examples
    classes: list[str]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised splits before they are shared out: the same for every seed and method."""

    train: Examples
    validation: Examples
    test: Examples
    classes: list[str]
    rows: Any


def label_classes(settings: DataSettings) -> tuple[dict[str, Any], list[Any], list[str]]:
    """The splits, the label values in the order of their class index, and their names.

    Raises:
        FedeltaError: if labels are not classes, or validation or test has one that training lacks.
    """
    splits = load_splits(settings)
    feature = splits["train"].features[settings.label]
    kind = str(getattr(feature, "dtype", "lists"))
    if not kind.startswith(("int", "uint", "string", "large_string", "bool")):
        raise FedeltaError(f"column {settings.label!r} holds {kind}, expected classes: text or whole numbers")
    values = sorted(set(splits["train"].unique(settings.label)))
    names = [str(value) for value in values]
    if hasattr(feature, "names"):
        values, names = list(range(len(feature.names))), list(feature.names)
    if len(values) < 2:
        raise FedeltaError(f"column {settings.label!r} holds one class only: {names}")
    for name in ("validation", "test"):
        unknown = sorted(set(splits[name].unique(settings.label)) - set(values))
        if unknown:
            raise FedeltaError(
                f"split {name} has the label {unknown[0]!r}, which no training row has; "
                "name other splits by data.splits, or choose another data.split_seed"
            )
    return splits, values, names


def build_corpus(
    settings: DataSettings, tokenizer: Any, splits: dict[str, Any], values: list[Any], names: list[str]
) -> Corpus:
    """Tokenise each split, once."""
    examples = {
        name: tokenise(split, settings.text_columns, settings.label, values, tokenizer, settings.max_length)
        for name, split in splits.items()
    }
    return Corpus(**examples, classes=names, rows=splits["train"])


def build_data(corpus: Corpus, settings: DataSettings, sharing: PartitionSettings, seed: int) -> FederatedData:
    """Share the training rows out to clients, each with its own held-out part.

    Raises:
        FedeltaError: if a client has too few rows to hold some out and train on the others.
    """
    shards = {}
    parts = partition(corpus.rows, list(corpus.train.labels), sharing, seed)
    for client, rows in zip(client_names(len(parts)), parts, strict=True):
        shards[client] = _shard(corpus.train, rows, client, settings.client_validation, seed)
    return FederatedData(shards, corpus.validation, corpus.test, corpus.classes)


def client_names(clients: int) -> list[str]:
    """Of so many clients, in the order of the partition, which is that of the alphabet."""
    digits = max(3, len(str(clients - 1)))
    return [f"client-{i:0{digits}d}" for i in range(clients)]


def _shard(examples: Examples, rows: Sequence[int], client: str, share: float, seed: int) -> Shard:
    held = 0
    if share > 0:
        held = max(1, round(share * len(rows)))
        if held >= len(rows):
            raise FedeltaError(f"{client} has {len(rows)} rows, too few to hold out {held} and train on the rest")
    order = np.random.default_rng(derive_seed(seed, "held out", client)).permutation(rows).tolist()
    return Shard(examples.select(sorted(order[held:])), examples.select(sorted(order[:held])))


def build_shard(settings: DataSettings, tokenizer: Any, classes: Sequence[str], client: str, seed: int) -> Shard:
    """A site's own rows, all of them, with the classes that the server has.

    Raises:
        FedeltaError: if the rows can't be read, or one has a label that the server does not know.
    """
    rows = load_rows(settings)
    feature = rows.features[settings.label]
    values = sorted(set(rows.unique(settings.label)))
    names = [feature.names[value] if hasattr(feature, "names") else str(value) for value in values]
    for name in names:
        if name not in classes:
            known = ", ".join(classes[:10])
            raise FedeltaError(f"data source {settings.source}: label {name!r} is none of the server's ({known})")
    examples = tokenise(rows, settings.text_columns, settings.label, values, tokenizer, settings.max_length)
    place = [list(classes).index(name) for name in names]
    examples = Examples(examples.features, [place[label] for label in examples.labels])
    return _shard(examples, range(len(examples)), client, settings.client_validation, seed)
