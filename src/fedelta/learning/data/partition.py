"""Assignment of training rows to clients: flwr-datasets' partitioners, and the two-quality mix of Byun & Lee."""

import contextlib
import io
import os
import warnings
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from fedelta.errors import FedeltaError, quantity
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
        clients: number of clients. `natural` may omit it, so that each value becomes a client.
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

    @model_validator(mode="after")
    def _consistent(self) -> "PartitionSettings":
        if self.kind == "natural" and self.by is None:
            raise ValueError("kind: natural needs the column to keep together, as by: COLUMN")
        if self.kind != "natural" and self.clients is None:
            raise ValueError(f"kind: {self.kind} needs the number of clients")
        return self


ROW_COLUMN = "__row__"


def partition(rows: Any, labels: list[int], settings: PartitionSettings, seed: int) -> list[list[int]]:
    """Assign rows to clients. No row goes to two clients.

    Args:
        rows: `datasets.Dataset` with the columns that the partition reads.
        labels: class index of each row.
        seed: seed of the run. Equal seeds give equal shards for every method.

    Returns:
        Row indices of each client.

    Raises:
        FedeltaError: if a client would get no rows, or the partition is impossible.
    """
    import datasets

    if settings.kind != "natural" and (settings.clients or 0) > len(labels):
        raise FedeltaError(
            f"partition {settings.kind}: {quantity(settings.clients or 0, 'client')}, "
            f"but only {quantity(len(labels), 'row')}"
        )
    draw = derive_seed(seed, "partition") % 2**32
    # A source may be sorted by label, and the IID partitioner cuts rows in order, so shuffle them first.
    order = np.random.default_rng(draw).permutation(len(labels)).tolist()
    columns: dict[str, Any] = {ROW_COLUMN: order, "label": [labels[i] for i in order]}
    if settings.kind == "natural":
        if settings.by not in rows.column_names:
            raise FedeltaError(f"partition.by: no column {settings.by!r}, found {', '.join(rows.column_names)}")
        groups = _groups(rows[settings.by][:], settings.clients)
        columns["group"] = [groups[i] for i in order]
    table = datasets.Dataset.from_dict(columns)
    try:
        if settings.kind == "two-quality":
            shards = _two_quality(table, settings, draw)
        else:
            shards = _shards(_partitioner(settings, draw), table)
    except (ValueError, FloatingPointError) as error:
        raise FedeltaError(f"partition {settings.kind}: {' '.join(str(error).split())}") from error
    for i, shard in enumerate(shards):
        if not shard:
            raise FedeltaError(
                f"partition {settings.kind}: client {i} of {len(shards)} gets none of the {len(labels)} rows; "
                "use fewer clients or a larger alpha"
            )
    return shards


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
    if settings.kind == "shards":
        return flwr.ShardPartitioner(clients, "label", settings.shards_per_client, seed=seed)
    return flwr.NaturalIdPartitioner("group")


def _shards(partitioner: Any, table: Any) -> list[list[int]]:
    partitioner.dataset = table
    # Some partitioners print a progress bar for a task of milliseconds, or warn about rows that no client gets.
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [sorted(partitioner.load_partition(i)[ROW_COLUMN][:]) for i in range(partitioner.num_partitions)]


def _groups(values: list[Any], clients: int | None) -> list[int]:
    """Client of each row. Rows of a value stay together; the largest value goes first to the smallest client."""
    names, sizes = np.unique(np.asarray(values, dtype=str), return_counts=True)
    client_of: dict[str, int] = {}
    load = np.zeros(clients or len(names))
    for i in sorted(range(len(names)), key=lambda i: (-sizes[i], names[i])):
        lightest = int(load.argmin())
        client_of[names[i]] = lightest
        load[lightest] += sizes[i]
    if clients is not None and clients > len(names):
        raise FedeltaError(
            f"partition natural: {quantity(clients, 'client')}, but only {quantity(len(names), 'different value')}"
        )
    return [client_of[str(value)] for value in values]


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
