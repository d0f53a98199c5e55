"""Assignment of training rows to clients: flwr-datasets' partitioners, and the two-quality mix of Byun & Lee."""

import contextlib
import io
import os
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from fedelta.errors import FedeltaError, quantity
from fedelta.learning.data.table import FILE_COLUMN, listed, say, shorten
from fedelta.seeds import derive_seed
from fedelta.settings import Settings, quota


class PartitionSettings(Settings):
    """Partition of the training rows among clients.

    Args:
        kind: `iid`; `dirichlet` (the rows of each label are divided among clients by Dir(alpha)); `pathological`
            (each client sees `classes_per_client` labels); `shards` (rows are sorted by label, and each client
            gets `shards_per_client` pieces); `natural` (all rows with the same value in the column `by` stay
            together); `two-quality` (all clients have the same size; the first `share` of them draw their label
            mix from Dir(alpha_high), the others from Dir(alpha_low), so some are balanced and some are not).
        clients: number of clients. If `natural` omits it, each value becomes a client with the value as its name.
        by: column of `natural`. If the source has several files, `__file__` is the name of each row's file.
        alpha: Dirichlet concentration. Smaller values give more uneven clients.
    """

    kind: Literal["iid", "dirichlet", "pathological", "shards", "natural", "two-quality"] = "iid"
    clients: int | None = Field(default=10, ge=1, le=1_000_000)
    alpha: float = Field(default=0.5, gt=0)
    classes_per_client: int = Field(default=2, ge=1, le=1_000_000)
    shards_per_client: int = Field(default=2, ge=1, le=1_000_000)
    by: str | None = None
    share: float = Field(default=0.1, ge=0, le=1)
    alpha_high: float = Field(default=100.0, gt=0)
    alpha_low: float = Field(default=0.5, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _every_value_is_a_client(cls, data: Any) -> Any:
        """Without `clients`, a natural partition has one client for each value, not the default number."""
        if isinstance(data, Mapping) and data.get("kind") == "natural" and "clients" not in data:
            return {**data, "clients": None}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> "PartitionSettings":
        if self.kind == "natural" and self.by is None:
            raise ValueError("kind: natural needs the column to keep together, as by: COLUMN")
        if self.kind != "natural" and self.clients is None:
            raise ValueError(f"kind: {self.kind} needs the number of clients")
        return self


ROW_COLUMN = "__row__"
ADVICE = {
    "iid": "use fewer clients",
    "dirichlet": "use fewer clients, or a partition.alpha nearer to 1",
    "pathological": "use fewer clients or other partition.classes_per_client",
    "shards": "use fewer clients or other partition.shards_per_client",
    "natural": "use fewer clients",
    "two-quality": "use fewer clients, or values of partition.alpha_low and alpha_high nearer to 1",
}
"""Kind → what helps if a client gets no rows, or the rows do not suffice."""

MAX_NAME = 40
"""Length of a client's name. Files are named after clients."""


def partition(rows: Any, labels: list[int], settings: PartitionSettings, seed: int) -> dict[str, list[int]]:
    """Assign rows to clients. No row goes to two clients.

    Args:
        rows: `datasets.Dataset` with the columns that the partition reads.
        labels: class index of each row.
        seed: seed of the run. Equal seeds give equal shards for every method.

    Returns:
        Client → its row indices, in the order of the clients' names.

    Raises:
        FedeltaError: if a client would get no rows, or the partition is impossible.
    """
    if settings.kind != "natural" and settings.by is not None:
        say(
            f"partition.by {shorten(settings.by, 40)!r} is not used, because partition.kind is {settings.kind}: "
            f"{quantity(settings.clients or 0, 'client')} draw from all rows"
        )
    if settings.kind == "natural":
        values = _values(rows, settings)
        if settings.clients is None:
            return _clients_by_value(values)
        parts = _merged(values, settings.clients)
    else:
        _check_possible(labels, settings)
        parts = _drawn(labels, settings, derive_seed(seed, "partition") % 2**32)
    for i, part in enumerate(parts):
        if not part:
            raise FedeltaError(
                f"partition {settings.kind}: client {i} of {len(parts)} gets none of the {len(labels)} rows; "
                f"{ADVICE[settings.kind]}"
            )
    if (unused := len(labels) - sum(map(len, parts))) >= len(parts):
        say(f"partition {settings.kind}: {unused} of {len(labels)} training rows belong to no client")
    return dict(zip(client_names(len(parts)), parts, strict=True))


def client_names(clients: int) -> list[str]:
    """Names of numbered clients in the order of the partition, which is also alphabetical."""
    digits = max(3, len(str(clients - 1)))
    return [f"client-{i:0{digits}d}" for i in range(clients)]


def _check_possible(labels: Sequence[int], settings: PartitionSettings) -> None:
    clients, kind = settings.clients or 0, settings.kind
    if clients > len(labels):
        raise FedeltaError(f"partition {kind}: {quantity(clients, 'client')}, but only {quantity(len(labels), 'row')}")
    if kind == "pathological" and settings.classes_per_client > (classes := len(set(labels))):
        raise FedeltaError(
            f"partition pathological: classes_per_client is {settings.classes_per_client}, but the training rows have "
            f"only {classes} different classes"
        )
    if kind == "shards" and clients * settings.shards_per_client > len(labels):
        raise FedeltaError(
            f"partition shards: {clients} clients with {settings.shards_per_client} shards each, but only "
            f"{len(labels)} rows; {ADVICE[kind]}"
        )


def _drawn(labels: Sequence[int], settings: PartitionSettings, seed: int) -> list[list[int]]:
    """Rows of each client, drawn by a partitioner of flwr-datasets."""
    import datasets

    # A source may be sorted by label, and the IID partitioner cuts rows in order, so shuffle them first.
    order = np.random.default_rng(seed).permutation(len(labels)).tolist()
    table = datasets.Dataset.from_dict({ROW_COLUMN: order, "label": [labels[i] for i in order]})
    try:
        if settings.kind == "two-quality":
            return _two_quality(table, settings, seed)
        return _shards(_partitioner(settings, seed), table)
    except Exception as error:
        # Extreme settings end in NaN, a division by zero, or an endless search for rows, each with its own error.
        raise FedeltaError(
            f"partition {settings.kind}: {len(labels)} rows can't be divided among {settings.clients} clients; "
            f"{ADVICE[settings.kind]}"
        ) from error


def _partitioner(settings: PartitionSettings, seed: int) -> Any:
    flwr = _partitioners()

    clients = settings.clients
    if settings.kind == "iid":
        return flwr.IidPartitioner(clients)
    if settings.kind == "dirichlet":
        # The partitioner draws up to ten times, until every client has a row.
        return flwr.DirichletPartitioner(clients, "label", settings.alpha, min_partition_size=1, seed=seed)
    if settings.kind == "pathological":
        return flwr.PathologicalPartitioner(
            clients, "label", settings.classes_per_client, class_assignment_mode="deterministic", seed=seed
        )
    return flwr.ShardPartitioner(clients, "label", settings.shards_per_client, seed=seed)


def _shards(partitioner: Any, table: Any) -> list[list[int]]:
    partitioner.dataset = table
    # Some partitioners print a progress bar for a task of milliseconds, or warn about rows that no client gets.
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [sorted(partitioner.load_partition(i)[ROW_COLUMN][:]) for i in range(partitioner.num_partitions)]


def _values(rows: Any, settings: PartitionSettings) -> list[str]:
    """The value of each row in the column of a natural partition, as text."""
    if settings.by not in rows.column_names:
        hint = "; only a source of several files has __file__" if settings.by == FILE_COLUMN else ""
        raise FedeltaError(
            f"partition.by: no column {shorten(settings.by, 40)!r}, found {listed(rows.column_names)}{hint}"
        )
    feature = rows.features[settings.by]
    values = rows[settings.by][:]
    if hasattr(feature, "names"):
        values = [feature.names[v] if v is not None and v >= 0 else None for v in values]
    empty = [i for i, value in enumerate(values) if value is None or value != value or not str(value).strip()]
    if empty:
        raise FedeltaError(
            f"partition.by: {quantity(len(empty), 'training row')} of {len(values)} have no value in column "
            f"{shorten(settings.by, 40)!r}, so they belong to no client"
        )
    return [str(value) for value in values]


def _merged(values: Sequence[str], clients: int) -> list[list[int]]:
    """Rows of `clients` clients. Rows of a value stay together; the largest value goes first to the smallest client."""
    names, sizes = np.unique(np.asarray(values, dtype=object), return_counts=True)
    if clients > len(names):
        raise FedeltaError(
            f"partition natural: {quantity(clients, 'client')}, but only {quantity(len(names), 'different value')}"
        )
    client_of: dict[str, int] = {}
    load = np.zeros(clients)
    for i in sorted(range(len(names)), key=lambda i: (-sizes[i], names[i])):
        lightest = int(load.argmin())
        client_of[names[i]] = lightest
        load[lightest] += sizes[i]
    parts: list[list[int]] = [[] for _ in range(clients)]
    for row, value in enumerate(values):
        parts[client_of[value]].append(row)
    return parts


def _clients_by_value(values: Sequence[str]) -> dict[str, list[int]]:
    """One client for each value, named after it, in letters, digits, `-` and `_`, because files have the name."""
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        rows.setdefault(value, []).append(row)
    names: dict[str, str] = {}
    taken: set[str] = set()
    for value in sorted(rows):
        name = plain = _plain_name(value)
        number = 2
        while name.lower() in taken:
            name, number = f"{plain}-{number}", number + 1
        taken.add(name.lower())
        names[name] = value
    changed = [(name, value) for name, value in names.items() if name != value]
    if changed:
        pairs = listed((f"{shorten(value, 30)!r} is {name}" for name, value in changed), 3, 80)
        say(f"partition natural: names of clients have letters, digits, - and _ only: {pairs}")
    return {name: rows[names[name]] for name in sorted(names)}


def _plain_name(value: str) -> str:
    letters = unicodedata.normalize("NFKD", value.replace("ß", "ss")).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_-]+", "-", letters).strip("-_")[:MAX_NAME] or "client"


def _two_quality(table: Any, settings: PartitionSettings, seed: int) -> list[list[int]]:
    """Two-quality partition of Byun & Lee: clients of equal size; the first share has balanced labels."""
    flwr = _partitioners()

    clients = settings.clients or 1
    good = quota(settings.share, clients)
    size = table.num_rows // clients
    shards: list[list[int]] = []
    for count, alpha, part in (
        (good, settings.alpha_high, range(good * size)),
        (clients - good, settings.alpha_low, range(good * size, table.num_rows)),
    ):
        if count:
            chosen = flwr.InnerDirichletPartitioner([size] * count, "label", float(alpha), seed=seed)
            shards += _shards(chosen, table.select(part))
    return shards


def _partitioners() -> Any:
    """Import Flower's partitioners with their usage reports turned off."""
    # A tool for private data must not report its use to a third party.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    from flwr_datasets import partitioner

    return partitioner
