"""Random draws of rows: those that are held out for validation and test, and those within a limit.

A draw is a simple random sample. Where that would lose a class and `data.stratify` is set, rows are drawn from each
class in proportion instead, so that a rare class stays in the training rows and, if it has enough rows, in each split.
A draw that loses no class needs no such correction, and remains a simple random sample.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np

from fedelta.errors import FedeltaError
from fedelta.learning.data.examples import rows_by_value
from fedelta.learning.data.settings import DataSettings
from fedelta.learning.data.table import shorten
from fedelta.seeds import derive_seed


def hold_out(
    splits: Mapping[str, Any], settings: DataSettings, together: str | None, classes: str | None
) -> dict[str, Any]:
    """Hold out rows of the training rows for `test` and `validation`, if the source lacks them.

    Args:
        splits: the splits of the source.
        together: column that defines groups: rows with the same value stay together.
        classes: column of the classes; None if there are none.

    Raises:
        FedeltaError: if too few rows would remain.
    """
    plain = _held_out(splits, settings, together, None)
    if together is not None or classes is None or not settings.stratify:
        return plain
    drawn = [plain["train"], *(plain[name] for name in plain if name not in splits)]
    if not _loses_a_class(splits["train"], drawn, classes):
        return plain
    return _held_out(splits, settings, together, classes)


def _held_out(
    splits: Mapping[str, Any], settings: DataSettings, together: str | None, classes: str | None
) -> dict[str, Any]:
    """The splits after the draws, from each class if `classes` is given."""
    result = dict(splits)
    for name in ("test", "validation"):
        if name not in result:
            train = result["train"]
            share, rows = getattr(settings, name), train.num_rows
            if not 0 < ceil(share * rows) < rows:
                source = shorten(settings.title, 100, end=True)
                raise FedeltaError(f"data source {source}: data.{name}={share} of {rows} rows leaves too few")
            seed = derive_seed(settings.split_seed, "split", name) % 2**32
            held = _rows_to_hold_out(train, ceil(share * rows), seed, settings, together, classes)
            if held is None:
                parts = train.train_test_split(share, seed=seed, load_from_cache_file=False)
                result["train"], result[name] = parts["train"], parts["test"]
            else:
                result["train"] = train.select(sorted(set(range(rows)) - set(held)))
                result[name] = train.select(sorted(held))
    return result


def _rows_to_hold_out(
    train: Any, number: int, seed: int, settings: DataSettings, together: str | None, classes: str | None
) -> list[int] | None:
    """Rows to hold out, as whole groups or from each class; None for a plain draw."""
    if together is not None:
        order = _grouped(train, together, seed)
        cut = _whole_groups(train, together, order, number)
        if cut == train.num_rows:
            raise FedeltaError(
                f"data source {shorten(settings.title, 100, end=True)}: all {cut} rows have the same "
                f"{shorten(together, 40)!r}, so none can be held out"
            )
        return order[:cut]
    return (draw_by_class(train[classes][:], number, seed, leave_one=True) or None) if classes is not None else None


def draw(
    rows: Any,
    limit: int | None,
    name: str,
    settings: DataSettings,
    together: str | None = None,
    classes: str | None = None,
) -> Any:
    """Draw at most `limit` rows of the split `name`, or all if there are not more."""
    if limit is None or rows.num_rows <= limit:
        return rows
    seed = derive_seed(settings.split_seed, "limit", name) % 2**32
    if together is not None:
        order = _grouped(rows, together, seed)
        return rows.select(order[: _whole_groups(rows, together, order, limit)])
    drawn = rows.shuffle(seed, load_from_cache_file=False).select(range(limit))
    if classes is not None and settings.stratify and _loses_a_class(rows, [drawn], classes):
        return rows.select(draw_by_class(rows[classes][:], limit, seed, leave_one=False))
    return drawn


def draw_by_class(labels: Sequence[Any], number: int, seed: int, leave_one: bool) -> list[int]:
    """Draw rows from each class in proportion to its size.

    Args:
        labels: class of each row.
        number: number of rows to draw.
        leave_one: leave at least one row of each class. A class of one row is then not drawn.

    Returns:
        Row indices, at least one of each class where `number` and `leave_one` allow it.
    """
    classes = sorted(rows_by_value(labels), key=lambda rows: (-len(rows), rows[0]))
    sizes = np.array([len(rows) for rows in classes])
    most = sizes - 1 if leave_one else sizes
    exact = sizes * number / len(labels)
    quotas = np.clip(np.floor(exact).astype(int), np.minimum(1, most), most)
    # The largest remainders first; where the minimum of one took too many, the largest classes give rows back.
    while quotas.sum() < number and (quotas < most).any():
        quotas[int(np.argmax(np.where(quotas < most, exact - quotas, -np.inf)))] += 1
    while quotas.sum() > number and (quotas > 1).any():
        quotas[int(np.argmax(np.where(quotas > 1, quotas - exact, -np.inf)))] -= 1
    if quotas.sum() > number:
        # Fewer rows than classes: the rarest are not drawn.
        quotas[number:] = 0
    generator = np.random.default_rng(seed)
    drawn = [generator.permutation(rows)[:quota] for rows, quota in zip(classes, quotas, strict=True)]
    return sorted(int(row) for rows in drawn for row in rows)


def _loses_a_class(rows: Any, parts: Sequence[Any], classes: str) -> bool:
    every = len(set(rows.unique(classes)))
    return any(len(set(part.unique(classes))) < every for part in parts)


def _grouped(rows: Any, column: str, seed: int) -> list[int]:
    """All rows, with the groups in random order and the rows of each group next to each other."""
    groups = rows_by_value(rows[column][:])
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    return [row for i in order for row in groups[i]]


def _whole_groups(rows: Any, column: str, order: list[int], limit: int) -> int:
    """Number of leading rows of `order` that hold only whole groups: at most `limit`, but at least one group."""
    values = [str(value) for value in rows[column][:]]
    ends = [i for i in range(1, len(order) + 1) if i == len(order) or values[order[i]] != values[order[i - 1]]]
    return max([end for end in ends if end <= limit], default=ends[0])
