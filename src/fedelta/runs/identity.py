"""The identity of what a run learns from: rows, tokenizer, chat template and base model, each with a digest.

A checkpoint, `result.json` and the row of a grid's cell include it, so that a run never continues with other rows or
another base without saying so.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedelta.errors import FedeltaError
from fedelta.federation.records import InputPart, Inputs
from fedelta.federation.schema import check
from fedelta.learning.digests import base_digests, rows_digest, template_digest, tokenizer_digest
from fedelta.reading import read_json
from fedelta.runs.assemble import read_inputs, splits_key
from fedelta.runs.config import Config, parse_config

ACCEPT = "--accept-changed-data"
SHOWN = 3
"""Number of changes that an error names."""


def identify(config: Config) -> dict[str, InputPart]:
    """Compute the digests of everything that a configuration reads, as it is now.

    Returns:
        Name of the part → digest: `training rows`, `validation rows` and `test rows` (the columns that the task reads,
        in order), `groups of rows` (the column of a natural partition), `tokenizer`, `chat template`, `base weights`
        and `base configuration`. The last two are missing if the base is not on this machine.

    Raises:
        FedeltaError: if the data or the tokenizer can't be read.
    """
    parts = dict(_text_parts(splits_key(config), config.partition.by if config.partition.kind == "natural" else None))
    return parts | _base_parts(config)


def _tokenizer_parts(tokenizer: Any) -> dict[str, InputPart]:
    return {
        "tokenizer": {"digest": tokenizer_digest(tokenizer)},
        "chat template": {"digest": template_digest(tokenizer)},
    }


def _base_parts(config: Config) -> dict[str, InputPart]:
    return {f"base {part}": {"digest": digest} for part, digest in base_digests(config.model.name).items()}


@functools.lru_cache(maxsize=256)
def _text_parts(key: str, group_column: str | None) -> Mapping[str, InputPart]:
    """Digests of the rows and of the tokenizer, once for all seeds and methods of a comparison."""
    config = parse_config(json.loads(key)["config"])
    splits, _, tokenizer = read_inputs(config)
    columns = config.task.columns(config.data).among(splits["train"].column_names).uses
    names = {"train": "training", "validation": "validation", "test": "test"}
    parts: dict[str, InputPart] = {
        f"{name} rows": {"digest": rows_digest(splits[split], columns), "rows": splits[split].num_rows}
        for split, name in names.items()
    }
    if group_column is not None:
        parts["groups of rows"] = {"digest": rows_digest(splits["train"], [group_column])}
    return parts | _tokenizer_parts(tokenizer)


def identify_site(config: Config, rows: Any, tokenizer: Any) -> dict[str, InputPart]:
    """Compute the digests of what a site of a deployment learns from: its own rows and the shared base model.

    Args:
        config: the site's configuration.
        rows: its rows, a `datasets.Dataset`.
        tokenizer: its tokenizer.
    """
    columns = config.task.columns(config.data).among(rows.column_names).uses
    parts: dict[str, InputPart] = {"training rows": {"digest": rows_digest(rows, columns), "rows": rows.num_rows}}
    return parts | _tokenizer_parts(tokenizer) | _base_parts(config)


def read_inputs_file(path: Path) -> Inputs:
    """Read digests that were written as JSON; empty if there is no file.

    Raises:
        FedeltaError: if the file is damaged.
    """
    if not path.exists():
        return {}
    data = read_json(path)
    if not isinstance(data, dict):
        raise FedeltaError(f"{path} holds a {type(data).__name__}, expected keys and values")
    return {part: check(value, InputPart, f"{path}, {part[:40]}") for part, value in data.items()}


def input_changes(before: Inputs, now: Inputs) -> list[str]:
    """Describe each part that differs. A part that one side does not know is not compared.

    Example:
        >>> input_changes({"test rows": {"digest": "a", "rows": 120}}, {"test rows": {"digest": "b", "rows": 140}})
        ['test rows changed: 140 rows, were 120']
    """
    changes = []
    for part, new in now.items():
        old = before.get(part)
        if old is None or new["digest"] == old["digest"]:
            continue
        rows, were = new.get("rows"), old.get("rows")
        if rows is None or were is None:
            counts = ""
        else:
            counts = f" (still {rows} rows)" if rows == were else f": {rows} rows, were {were}"
        changes.append(f"{part} changed{counts}")
    return changes


def check_changes(place: str, changes: Sequence[str], accept: bool) -> None:
    """Raise if inputs have changed and that is not accepted.

    Args:
        place: what was made with the former inputs, such as the folder of a run.
        changes: as `input_changes` returns them.
        accept: True to continue anyway.

    Raises:
        FedeltaError: one line with the changes and the option that accepts them.
    """
    if changes and not accept:
        more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
        raise FedeltaError(f"{place}: {', '.join(changes[:SHOWN])}{more}; restore the former inputs, or pass {ACCEPT}")


def differing_inputs(runs: Sequence[Inputs]) -> list[str]:
    """Names of the parts in which some of these inputs differ."""
    parts = dict.fromkeys(part for inputs in runs for part in inputs)
    return [part for part in parts if len({inputs[part]["digest"] for inputs in runs if part in inputs}) > 1]
