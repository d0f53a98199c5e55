"""The files of a data source, and which split each belongs to.

In a folder, only exact names count: `train`, `validation` (or `valid`, `val`, `dev`) and `test`, alone or as numbered
shards such as `train-00000-of-00002`. A loose match would silently add rows: `train_notes.csv` is not training data.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from fedelta.errors import FedeltaError
from fedelta.files import expand_variables
from fedelta.learning.data.excel import read_excel
from fedelta.learning.data.json_rows import read_json
from fedelta.learning.data.settings import DataSettings, SplitName
from fedelta.learning.data.streams import FORMATS, format_of, named, zip_format
from fedelta.learning.data.table import FILE_COLUMN, Places, Table, as_dataset, join, listed, loaded_table, shorten
from fedelta.learning.data.tables import read_table

Loader = Callable[[], Table]
NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
NAMES |= {"test": "test"}
"""Name of a file without its ending → split."""

SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)")
NOT_ROWS = ("dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json")
"""JSON files that describe a data set."""


def read_file(path: Path, settings: DataSettings, wanted: Collection[str]) -> Table:
    """Read one file.

    Raises:
        FedeltaError: if the file can't be read. The line names it and, where it can, the row.
    """
    kind = format_of(path)
    if kind == "zip":
        kind = zip_format(path)
    if kind is None:
        known = ", ".join(FORMATS)
        raise FedeltaError(f"data file {named(path)}: unknown extension, expected one of {known}, also as .gz or .zip")
    if kind not in ("csv", "tsv"):
        for key in ("columns", "delimiter", "quoting"):
            if getattr(settings, key) is not None:
                raise FedeltaError(f"data.{key} is set, but {named(path)} is neither a CSV nor a TSV file")
    if kind in ("csv", "tsv"):
        return read_table(path, kind, settings, wanted)
    if kind in ("json", "jsonl"):
        return read_json(path, kind, settings.encoding)
    return _checked_rows(path, read_excel(path) if kind == "xlsx" else _read_parquet(path))


def _read_parquet(path: Path) -> Table:
    import pyarrow.parquet as pq

    from fedelta.learning.data.streams import opened

    with opened(path) as stream:
        try:
            table = pq.read_table(pa.BufferReader(stream.read()) if path.suffix.lower() != ".parquet" else path)
            rows = as_dataset(table)
        except (pa.ArrowException, OSError, ValueError, TypeError, NotImplementedError) as error:
            line = " ".join(str(error).split()) or type(error).__name__
            raise FedeltaError(
                f"data source {named(path)}: not a Parquet file that can be read ({line[:100]})"
            ) from error
    return Table(rows, Places.of(str(path), range(1, table.num_rows + 1), "row"))


def _checked_rows(path: Path, table: Table) -> Table:
    if not len(table):
        raise FedeltaError(f"data file {named(path)}: no rows")
    return table


def read_files(name: str, paths: Sequence[Path], settings: DataSettings, wanted: Collection[str]) -> Table:
    """Read files that belong together. Several files also get a column with the name of each row's file.

    Raises:
        FedeltaError: if a file can't be read, or the files have different columns.
    """
    tables = [read_file(path, settings, wanted) for path in paths]
    if len(tables) > 1:
        for i, (file, table) in enumerate(zip(file_names(paths), tables, strict=True)):
            if FILE_COLUMN not in table.rows.column_names:
                rows = table.rows.add_column(FILE_COLUMN, [file] * len(table))
                tables[i] = Table(rows, table.places, table.mixed)
    return join(name, tables)


def file_names(paths: Sequence[Path]) -> list[str]:
    """The shortest names that tell files apart: without the common folder, the ending and a common last part.

    Example:
        >>> file_names([Path("data/bonn.csv"), Path("data/kiel.csv")])
        ['bonn', 'kiel']
        >>> file_names([Path("data/bonn/train.csv"), Path("data/kiel/train.csv")])
        ['bonn', 'kiel']
    """
    parts = [[*path.parts[:-1], path.name.split(".")[0] or path.name] for path in paths]
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    names = ["/".join(p) for p in parts]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def is_path(source: str) -> bool:
    """Whether a source looks like a path, so that it must never become a request to a hub."""
    begins = source.startswith((".", "/", "~"))
    return begins or source.count("/") > 1 or is_pattern(source) or format_of(Path(source)) is not None


def is_pattern(source: str) -> bool:
    """Whether a source stands for several files."""
    return "*" in source or "?" in source


def expand(source: str) -> list[Path]:
    """The files of a path or a pattern, in the order of their names.

    Raises:
        FedeltaError: if there are none.
    """
    path = Path(expand_variables(source)).expanduser()
    text = str(path)
    if is_pattern(text) and not Path(text).exists():
        paths = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        paths = [path for path in paths if path.is_file() and format_of(path)]
        if not paths:
            raise FedeltaError(f"data source {shorten(source, 100, end=True)}: no data file matches this pattern")
        return paths
    if not path.exists():
        raise FedeltaError(f"data source {shorten(source, 100, end=True)}: no such file or folder")
    return [path]


def chosen_files(sources: Sequence[str]) -> list[Path]:
    """All files of a list of paths and patterns.

    Raises:
        FedeltaError: if one is missing, occurs twice, or is not a file.
    """
    paths = [path for source in sources for path in expand(source)]
    for path in paths:
        if not path.is_file():
            raise FedeltaError(f"data source {named(path)}: expected a file, because data.source lists several")
    real = [path.resolve() for path in paths]
    if len(set(real)) < len(real):
        twice = next(path for path in paths if real.count(path.resolve()) > 1)
        raise FedeltaError(f"data source {named(twice)}: data.source lists this file twice")
    return paths


def split_files(folder: Path, chosen: Mapping[SplitName, str | None]) -> dict[str, list[Path]]:
    """Split → its files in a folder. A single file with another name holds training rows.

    Args:
        chosen: `data.splits`. If it names a file of the folder, the other files are not used unless their names are
            those of splits.

    Returns:
        An empty dict if the folder has no data files, as a copy of a hub repository, which has them in subfolders.

    Raises:
        FedeltaError: if a file's name is not that of a split, two files are the same split, or a shard is missing.
    """
    files = sorted(
        file
        for file in folder.iterdir()
        if format_of(file) and file.is_file() and not file.name.startswith((".", "~$")) and file.name not in NOT_ROWS
    )
    if len(files) == 1 and split_of(files[0]) is None:
        return {"train": files}
    splits: dict[str, list[Path]] = {}
    for file in files:
        if split := split_of(file):
            splits.setdefault(split, []).append(file)
    named_files = {value for value in chosen.values() if value and (folder / value).is_file()}
    others = [file.name for file in files if split_of(file) is None]
    if others and not named_files:
        raise FedeltaError(
            f"data source {named(folder)}: {listed(others, 3)}: expected names train, validation (valid, val, dev) or "
            "test; name the files in data.splits: {train: FILE}, or all training rows as data.source: 'FOLDER/*.csv'"
        )
    for split, own in splits.items():
        _check_shards(folder, split, own)
    return splits


def _stem(file: Path) -> str:
    return file.name.split(".")[0].lower()


def split_of(file: Path) -> str | None:
    """The split that a file's name says; None if it is not the name of one."""
    shard = SHARD.fullmatch(_stem(file))
    return NAMES.get(shard[1] if shard else _stem(file))


def _check_shards(folder: Path, split: str, files: Sequence[Path]) -> None:
    shards = [SHARD.fullmatch(_stem(file)) for file in files]
    kinds = {
        (shard[1], int(shard[3])) if shard else (_stem(file), 0) for shard, file in zip(shards, files, strict=True)
    }
    formats = {format_of(file) for file in files}
    if len(kinds) > 1 or len(formats) > 1 or (len(files) > 1 and not shards[0]):
        names = listed((file.name for file in files), 3)
        raise FedeltaError(f"data source {named(folder)}: {names} are all the split {split}, expected one of them")
    number = next(iter(kinds))[1]
    if number and sorted(int(shard[2]) for shard in shards if shard) != list(range(number)):
        raise FedeltaError(
            f"data source {named(folder)}: {len(files)} of {number} shards of the split {split} are there"
        )


def folder_loaders(folder: Path, settings: DataSettings, wanted: Collection[str]) -> dict[str, Loader]:
    """Split → a function that reads it, for a folder with files named by split or saved by `save_to_disk`."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved(folder)
    files = split_files(folder, settings.splits)
    return {
        split: lambda own=own: read_files(str(folder), own, settings, wanted)  # type: ignore[misc]
        for split, own in files.items()
    }


def _saved(folder: Path) -> dict[str, Loader]:
    """The splits of a folder that `save_to_disk` wrote: Arrow files and JSON, without code."""
    import datasets

    loaded = datasets.load_from_disk(str(folder))
    splits: dict[str, Any] = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    return {name: lambda name=name, rows=rows: loaded_table(f"split {name}", rows) for name, rows in splits.items()}  # type: ignore[misc]
