"""The results of a grid: a Parquet file with one row per cell, which holds the rounds of the cell."""

import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedelta.errors import FedeltaError
from fedelta.federation.records import Inputs
from fedelta.federation.schema import digest_of
from fedelta.files import write_file
from fedelta.learning.tasks.metrics import METRICS, Metric
from fedelta.protocol.serialization import ByteCount
from fedelta.reading import parse_json
from fedelta.runs.config import Config, parse_config
from fedelta.runs.identity import input_changes
from fedelta.runs.runner import Run
from fedelta.sweep.columns import SCHEMA
from fedelta.sweep.provenance import machine_name, peak_mb

FILE = "cells.parquet"
Row = dict[str, Any]

FROM_RESULT = ("test", "validation", "constant_score", "lora_parameters", "base_parameters")
"""Fields that a row copies from `result.json`."""
CIRCUMSTANCES = ("seconds", "peak_mb", "finished", "machine", "versions", "accepted", "digest")
"""Fields that may differ between two runs of the same cell."""


def row_of(
    key: str,
    config: Config,
    made_with: Mapping[str, str],
    run: Run | None,
    failed: str | None = None,
    inputs: Inputs | None = None,
) -> Row:
    """Make the row of a cell as plain data.

    Args:
        key: key of the cell.
        config: its configuration.
        made_with: versions as `provenance.versions` returns them.
        run: the finished run; None if it failed.
        failed: why it failed.
        inputs: what the cell has learned from, if there is no run whose result says so.
    """
    row: Row = dict.fromkeys(SCHEMA.names)
    row |= {
        "cell": key,
        "method": config.method.name,
        "seed": config.seed,
        "metric": config.task.metric,
        "failed": failed,
        "rounds": [],
        "config": json.dumps(result_settings(config), sort_keys=True),
        "peak_mb": round(peak_mb(), 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_name(),
        "versions": dict(made_with),
        "inputs": None if inputs is None else json.dumps(inputs, sort_keys=True),
        "accepted": [],
    }
    if run is not None:
        result: Mapping[str, Any] = run.result
        timings = run.folder.timings()
        accepted = [f"round {one['round']}: {change}" for one in result["accepted"] for change in one["changes"]]
        row |= {
            "inputs": json.dumps(result["inputs"], sort_keys=True),
            "accepted": accepted,
            **{name: result[name] for name in FROM_RESULT},
            "clients": len(result["clients"]),
            "rounds": [_round(record, config.task.metric) for record in run.records],
            "scaled_deviation": [record["scaled_deviation"] for record in run.records],
            "seconds": round(sum(sum(timing["seconds"].values()) for timing in timings), 2),
        }
    return row


def result_settings(config: Config) -> dict[str, Any]:
    """The settings that a result depends on, as plain data: without output folders and numbers of processes."""
    data = json.loads(json.dumps(config.dump()))
    for key in ("name", "output", "workers", "compare"):
        del data[key]
    del data["evaluation"]["target"], data["federation"]["deadline"]
    return data


def is_result_of(row: Row, config: Config) -> bool:
    """Whether a row has this configuration."""
    return stored_settings(row) == result_settings(config)


def stored_settings(row: Row) -> dict[str, Any]:
    """The settings of a row, with the defaults of settings that are newer than the row.

    Raises:
        FedeltaError: if the row has a setting that does not exist.
    """
    name = f"cell {row['cell']}"
    return result_settings(parse_config(parse_json(row["config"], name), name))


def _round(record: Mapping[str, Any], metric: str) -> dict[str, Any]:
    named = ("train_loss", "validation", "ranks", "promoted", "deviation", "patch_width")
    return {
        **{name: record[name] for name in named},
        "round": record["round"] + 1,
        "sampled": len(record["bytes_by_client"]),
        "clients": len(record["clients"]),
        "down": {name: record["bytes_down"][name] for name in ByteCount._fields},
        "up": {name: record["bytes_up"][name] for name in ByteCount._fields},
        "energy": record["energy_by_rank"],
        "own": [
            {"client": client, "rank": scores["rank"], "score": scores[metric]}
            for client, scores in record["clients_validation"].items()
        ],
    }


def stored_inputs(row: Row) -> Inputs:
    """What a cell has learned from; empty if its row does not say so."""
    return json.loads(row["inputs"]) if row["inputs"] else {}


def write_rows(folder: Path, rows: Mapping[str, Row], axes: Mapping[str, Mapping[str, str]] | None = None) -> Path:
    """Replace the file with these rows.

    Args:
        folder: folder of the file.
        rows: key → row of each cell.
        axes: key → axis → value. They become columns named `axis NAME`, for readers of the file; `read_rows` ignores
            them, because the grid has them.
    """
    table = pa.Table.from_pylist(list(rows.values()), schema=SCHEMA)
    for name in dict.fromkeys(axis for values in (axes or {}).values() for axis in values):
        column = [(axes or {}).get(key, {}).get(name) for key in rows]
        table = table.append_column(f"axis {name}", pa.array(column, pa.string()))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", compression_level=15)
    write_file(folder / FILE, buffer.getvalue())
    return folder / FILE


def read_rows(folder: Path) -> dict[str, Row]:
    """Read the rows of a folder by the key of their cell; empty if there is no file yet.

    Raises:
        FedeltaError: if the file is damaged or has another schema.
    """
    file = folder / FILE
    if not file.exists():
        return {}
    try:
        rows: list[Row] = pq.read_table(file, schema=SCHEMA).to_pylist(maps_as_pydicts="strict")
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise FedeltaError(f"{file}: {' '.join(str(error).split())[:150]}; restore it, or remove it") from error
    for row in rows:
        _check_row(row, file)
    return {row["cell"]: row for row in rows}


def _check_row(row: Row, file: Path) -> None:
    """Raise unless a row has the fields that every reader needs, and is what was written."""
    for name in ("cell", "method", "seed", "metric", "rounds", "config"):
        if row[name] is None:
            raise FedeltaError(f"{file}: a row without {name!r}, expected the results of a grid")
    if row["metric"] not in METRICS:
        raise FedeltaError(f"{file}: cell {row['cell']} has the metric {row['metric'][:40]!r}, which does not exist")
    if row["digest"] is not None and row["digest"] != _row_digest(row):
        raise FedeltaError(f"{file}: cell {row['cell']} is not what was written; restore the file, or remove it")


def _row_digest(row: Row) -> str:
    return digest_of({name: value for name, value in row.items() if name != "digest"})


def as_stored(row: Row) -> Row:
    """Convert a row to the precision of the file, as if it had been written and read again, and add its digest."""
    table = pa.Table.from_pylist([row], schema=SCHEMA)
    stored: Row = table.to_pylist(maps_as_pydicts="strict")[0]
    return stored | {"digest": _row_digest(stored)}


def first_difference(old: Row, new: Row) -> str | None:
    """Name the first difference of two rows of one cell, other than their circumstances; None if there is none.

    A field that only one of the rows has, because the other one is older, is not a difference.
    """
    old, new = _in_common(old, new), _in_common(new, old)
    for name in SCHEMA.names:
        if name == "inputs":
            if changes := input_changes(stored_inputs(old), stored_inputs(new)):
                return f"inputs: {'; '.join(changes)}"
        elif name == "config":
            if stored_settings(old) != stored_settings(new):
                return "config"
        elif name not in CIRCUMSTANCES and old[name] != new[name]:
            if name == "rounds":
                pairs = enumerate(zip(old[name], new[name], strict=False), 1)
                number = next((i for i, (a, b) in pairs if a != b), "number")
                return f"rounds, first in round {number}"
            return f"{name}: {old[name]} before, {new[name]} now"
    return None


def _in_common(row: Row, other: Row) -> Row:
    """A row without the scores that the other row lacks."""

    def common(one: Row, two: Row) -> Row:
        shared = {name: one[name] for name in ("validation", "test") if one.get(name) and two.get(name)}
        return one | {name: {k: v for k, v in shared[name].items() if k in two[name]} for name in shared}

    pairs: Iterable[tuple[Row, Row]] = itertools.zip_longest(
        row["rounds"], other["rounds"][: len(row["rounds"])], fillvalue={}
    )
    return common(row, other) | {"rounds": [common(one, two) for one, two in pairs]}


def metric_of(row: Row) -> Metric:
    """The metric that a cell is judged by."""
    return METRICS[row["metric"]]


def score(row: Row, split: str = "test") -> float:
    """Score of the final model on a split."""
    return row[split][row["metric"]]


def evaluations(row: Row) -> list[tuple[int, float]]:
    """(finished rounds, validation score) of each evaluated round."""
    return [(r["round"], r["validation"][row["metric"]]) for r in row["rounds"] if r["validation"] is not None]


def late_score(row: Row, share: float) -> float | None:
    """Mean validation score over the last share of the evaluations; None for a cell that diverged."""
    if row["failed"] is not None:
        return None
    return _late([value for _, value in evaluations(row)], share)


def late_loss(row: Row, share: float) -> float:
    """Mean validation loss over the last share of the evaluations."""
    return _late([r["validation"]["loss"] for r in row["rounds"] if r["validation"] is not None], share)


def _late(values: Sequence[float], share: float) -> float:
    return mean(values[-max(1, round(share * len(values))) :])
