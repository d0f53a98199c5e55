"""Sources of texts and labels: the built-in data set, local files and folders, or a hub.

`datasets.load_dataset` reads all of them except the built-in one: CSV, JSONL, Parquet and the hub. The splits of a
local folder are loaded one at a time, because they often have different columns.
"""

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fedelta.errors import FedeltaError
from fedelta.files import expand_variables
from fedelta.learning.data.examples import rows_by_value
from fedelta.learning.data.pydoc import read_pydoc
from fedelta.learning.in_memory import PREFIX, remembered_data
from fedelta.seeds import derive_seed
from fedelta.settings import Settings

BUILT_IN = "pydoc"
FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SplitName = Literal["train", "validation", "test"]
TEXT_DTYPES = ("string", "large_string", "null")
Columns = Mapping[str, bool]
"""Column → True if it must hold text."""

SPLIT_PREFIXES: dict[SplitName, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("valid", "val", "dev"),
    "test": ("test",),
}
"""Split → the prefixes of the names of its files."""


class DataSettings(Settings):
    """Texts, labels and splits.

    Args:
        source: `pydoc`, a file (CSV, TSV, JSON, JSONL, Parquet), a folder of such files, or a hub name. A path may
            name an environment variable, `${NAME}/folder` or `${NAME:-default}/folder`.
        configuration: configuration of a hub data set, for example `mrpc` of `glue`.
        text: column of the text, or two columns for pairs of texts.
        label: column of the label.
        max_length: maximum number of tokens. Longer texts are truncated.
        validation, test: share of the training rows to hold out if the source lacks this split.
        limit: maximum number of training rows, drawn at random by `split_seed`.
        evaluation_limit: maximum number of rows in each of validation and test, drawn at random by `split_seed`.
        client_validation: share of its rows that each client holds out for its own validation loss.
        splits: names of `train`, `validation` and `test` in the source if they differ; null omits a split. GLUE
            keeps its test labels secret, so use {test: validation, validation: null}.
        split_seed: seed of the splits. It is separate from the run's seed, so that all seeds share one test set.
    """

    source: str = BUILT_IN
    configuration: str | None = None
    text: str | tuple[str, str] = "text"
    label: str = "label"
    max_length: int = Field(default=128, ge=2)
    validation: float = Field(default=0.1, gt=0, lt=1)
    test: float = Field(default=0.2, gt=0, lt=1)
    limit: int | None = Field(default=None, ge=1)
    evaluation_limit: int | None = Field(default=None, ge=1)
    client_validation: float = Field(default=0.1, ge=0, lt=1)
    split_seed: int = Field(default=0, ge=0)
    splits: dict[SplitName, str | None] = Field(default_factory=dict)

    @property
    def text_columns(self) -> tuple[str, ...]:
        return (self.text,) if isinstance(self.text, str) else self.text


def load_splits(settings: DataSettings, columns: Columns, together: str | None = None) -> dict[str, Any]:
    """Load `train`, `validation` and `test` as `datasets.Dataset`: disjoint, and the same in every run.

    Args:
        columns: columns to read.
        together: column that defines groups: no draw separates rows with the same value.

    Raises:
        FedeltaError: if the source does not exist, can't be read, or lacks a column.
    """
    splits = _named_splits(settings, columns)
    train = splits["train"]
    held_out = {}
    for name in ("test", "validation"):
        if name in splits:
            held_out[name] = splits[name]
            continue
        share, rows = getattr(settings, name), train.num_rows
        if not 0 < ceil(share * rows) < rows:
            raise FedeltaError(f"data source {settings.source}: data.{name}={share} of {rows} rows leaves too few")
        seed = derive_seed(settings.split_seed, "split", name) % 2**32
        if together is None:
            parts = train.train_test_split(share, seed=seed, load_from_cache_file=False)
            train, held_out[name] = parts["train"], parts["test"]
        else:
            order = _grouped(train, together, seed)
            cut = _whole_groups(train, together, order, ceil(share * rows))
            held_out[name], train = train.select(sorted(order[:cut])), train.select(sorted(order[cut:]))
    return {
        "train": _draw(train, settings.limit, settings, "train", together),
        "validation": _draw(held_out["validation"], settings.evaluation_limit, settings, "validation", together),
        "test": _draw(held_out["test"], settings.evaluation_limit, settings, "test", together),
    }


def load_rows(settings: DataSettings, columns: Columns) -> Any:
    """Load the training rows of a source without holding any out. Its other splits are not used.

    Raises:
        FedeltaError: for the same reasons as `load_splits`.
    """
    rows = _named_splits(settings, columns)["train"]
    return _draw(rows, settings.limit, settings, "train")


def _named_splits(settings: DataSettings, columns: Columns) -> dict[SplitName, Any]:
    """The splits that the source has, under our names, after a check of the columns to read."""
    loaded = _load(settings)
    splits: dict[SplitName, Any] = {}
    taken: list[str] = []
    for name in SPLIT_PREFIXES:
        source_name = settings.splits.get(name, name if name in loaded else None)
        if source_name is None:
            continue
        if source_name not in loaded:
            raise FedeltaError(
                f"data.splits: {settings.source} has no split {source_name!r}, found {', '.join(loaded)}"
            )
        if source_name in taken:
            raise FedeltaError(
                f"data.splits: {source_name!r} is used twice, expected disjoint splits; set one of them to null"
            )
        taken.append(source_name)
        splits[name] = loaded[source_name]
    if "train" not in splits:
        raise FedeltaError(f"data source {settings.source} has splits {sorted(loaded)}, expected one named train")
    for name, split in splits.items():
        for column, is_text in columns.items():
            if column not in split.column_names:
                raise FedeltaError(
                    f"data source {settings.source}: no column {column!r} in split {name}, "
                    f"found {', '.join(split.column_names)}"
                )
            kind = str(getattr(split.features[column], "dtype", "list"))
            if is_text and kind not in TEXT_DTYPES:
                raise FedeltaError(f"data source {settings.source}: column {column!r} holds {kind}, expected text")
            if split.num_rows and split.data.column(column).null_count:
                raise FedeltaError(f"data source {settings.source}: empty cells in column {column!r} of {name}")
    return splits


def _draw(split: Any, limit: int | None, settings: DataSettings, name: str, together: str | None = None) -> Any:
    if limit is None or split.num_rows <= limit:
        return split
    seed = derive_seed(settings.split_seed, "limit", name) % 2**32
    if together is None:
        return split.shuffle(seed, load_from_cache_file=False).select(range(limit))
    order = _grouped(split, together, seed)
    return split.select(order[: _whole_groups(split, together, order, limit)])


def _grouped(split: Any, column: str, seed: int) -> list[int]:
    """All rows, with the groups in random order and the rows of each group next to each other."""
    groups = rows_by_value(split[column][:])
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    return [row for i in order for row in groups[i]]


def _whole_groups(split: Any, column: str, order: list[int], limit: int) -> int:
    """Number of leading rows of `order` that hold only whole groups: at most `limit`, but at least one group."""
    values = [str(value) for value in split[column][:]]
    ends = [i for i in range(1, len(order) + 1) if i == len(order) or values[order[i]] != values[order[i - 1]]]
    return max([end for end in ends if end <= limit], default=ends[0])


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Split → its files, by the prefix of their names: `train-00000-of-00002.parquet`, `dev.csv`, `test.jsonl`.

    A single file with another name holds training rows. The result is empty if no file fits, as in a copy of a hub
    repository, which has its files in subfolders.
    """
    split_files: dict[str, list[Path]] = {}
    files = sorted(file for file in folder.iterdir() if file.suffix in FORMATS)
    for file in files:
        for split, prefixes in SPLIT_PREFIXES.items():
            if file.name.lower().startswith(prefixes):
                split_files.setdefault(split, []).append(file)
    return split_files or ({"train": files} if len(files) == 1 else {})


def _load_files(files: list[Path]) -> Any:
    import datasets

    kinds = {file.suffix for file in files}
    if len(kinds) > 1:
        raise FedeltaError(
            f"data files of one split have different extensions: {', '.join(file.name for file in files)}"
        )
    suffix = kinds.pop()
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    return datasets.load_dataset(FORMATS[suffix], data_files=[str(f) for f in files], split="train", **options)


def _load(settings: DataSettings) -> dict[str, Any]:
    # The import is slow, and nothing else needs it.
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    source = expand_variables(settings.source)
    if source.startswith(PREFIX):
        return remembered_data(source)
    if source == BUILT_IN:
        return {"train": datasets.Dataset.from_list(read_pydoc())}
    path = Path(source).expanduser()
    try:
        if path.is_file():
            if path.suffix not in FORMATS:
                raise FedeltaError(f"data file {source}: unknown extension, expected one of {', '.join(FORMATS)}")
            return {"train": _load_files([path])}
        if path.is_dir() and (splits := _split_files(path)):
            return {name: _load_files(files) for name, files in splits.items()}
        # A path that does not exist must not become a request to a hub.
        if not path.is_dir() and (
            source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix in FORMATS
        ):
            raise FedeltaError(f"data source {source}: no such file or folder")
        return dict(datasets.load_dataset(source, settings.configuration))
    except FedeltaError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        line = str(cause).strip().splitlines()
        raise FedeltaError(f"data source {source}: {line[0] if line else type(cause).__name__}") from error
