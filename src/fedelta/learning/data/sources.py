"""Sources of texts and labels: the built-in data set, local files and folders, rows in memory, or a hub."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from fedelta.errors import FedeltaError, in_one_line
from fedelta.files import expand_variables
from fedelta.learning.data.cells import check_columns, complete_rows, usable_rows
from fedelta.learning.data.duplicates import report_duplicates, without_duplicates
from fedelta.learning.data.files import Loader, chosen_files, expand, folder_loaders, is_path, is_pattern, read_files
from fedelta.learning.data.hub import load_hub
from fedelta.learning.data.in_memory import PREFIX, remembered_data
from fedelta.learning.data.labels import resolve_labels
from fedelta.learning.data.pydoc import read_functions, read_pydoc
from fedelta.learning.data.settings import BUILT_IN, BUILT_IN_FUNCTIONS, Columns, DataSettings, SplitName
from fedelta.learning.data.splits import draw, hold_out
from fedelta.learning.data.streams import named
from fedelta.learning.data.table import DataWarning, Table, listed, loaded_table, shorten

READERS = {BUILT_IN: read_pydoc, BUILT_IN_FUNCTIONS: read_functions}
"""Built-in data set → the function that reads its rows."""


def load_splits(settings: DataSettings, columns: Columns, together: str | None = None) -> dict[str, Any]:
    """Load `train`, `validation` and `test` as `datasets.Dataset`: disjoint, and the same in every run.

    Args:
        columns: columns to read. Afterwards a class is its name as text (or a `ClassLabel`), and a number a float.
        together: column that defines groups: no draw separates rows with the same value.

    Raises:
        FedeltaError: if the source does not exist, can't be read, or lacks a column. The line names the file and row.
    """
    tables, columns = _checked_tables(settings, columns)
    splits = {name: table.rows for name, table in tables.items()}
    splits = hold_out(splits, settings, together, columns.classes)
    limits = {"train": settings.limit, "validation": settings.evaluation_limit, "test": settings.evaluation_limit}
    splits = {
        name: draw(splits[name], limit, name, settings, together, columns.classes) for name, limit in limits.items()
    }
    report_duplicates(splits, columns)
    return splits


def load_rows(settings: DataSettings, columns: Columns) -> Any:
    """Load the training rows of a source without holding any out. Its other splits are not read.

    Raises:
        FedeltaError: for the same reasons as `load_splits`.
    """
    tables, columns = _checked_tables(settings, columns, ("train",))
    rows = tables["train"].rows
    drawn = draw(rows, settings.limit, "train", settings, classes=columns.classes)
    report_duplicates({"train": drawn}, columns)
    return drawn


def find_place(settings: DataSettings, columns: Columns, row: Mapping[str, Any]) -> str | None:
    """Find where a row stands in its source, such as `texts.csv, line 7`; None if it is not there.

    The draws of rows do not keep their places, so that the source is read again. Of equal rows, the first is found.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        tables, columns = _checked_tables(settings, columns)
    used = {name: row[name] for name in columns.uses}
    for table in tables.values():
        for i, other in enumerate(table.rows.select_columns(list(used))):
            if other == used:
                return table.places.name(i)
    return None


def _checked_tables(
    settings: DataSettings, columns: Columns, names: tuple[SplitName, ...] = get_args(SplitName)
) -> tuple[dict[str, Table], Columns]:
    """The splits that the source has, with valid labels and without empty cells or, if set so, duplicates.

    Returns:
        The splits, and the columns that the task reads from this source.
    """
    source = shorten(settings.title, 100, end=True)
    tables: dict[str, Table] = {
        name: load() for name, load in _named_loaders(settings, columns).items() if name in names
    }
    try:
        columns = columns.among(tables["train"].rows.column_names)
    except FedeltaError as error:
        raise FedeltaError(f"data source {source}: {error}") from error
    for name, table in tables.items():
        if not len(table):
            raise FedeltaError(f"data source {source}: split {name} has no rows")
        check_columns(source, name, table, columns)
    tables = complete_rows(source, tables, columns, settings)
    tables = usable_rows(source, tables, columns, settings)
    tables = resolve_labels(source, tables, columns, settings)
    return (without_duplicates(tables, columns) if settings.deduplicate else tables), columns


def _named_loaders(settings: DataSettings, columns: Columns) -> dict[SplitName, Loader]:
    """The splits that the source has, under our names."""
    loaders = _loaders(settings, columns)
    source = shorten(settings.title, 100, end=True)
    splits: dict[SplitName, Loader] = {}
    taken: list[str] = []
    for name in get_args(SplitName):
        chosen = settings.splits.get(name, name if name in loaders else None)
        if chosen is None:
            continue
        if chosen in taken:
            raise FedeltaError(
                f"data.splits: {chosen!r} is used twice, expected disjoint splits; set one of them to null"
            )
        taken.append(chosen)
        splits[name] = loaders[chosen] if chosen in loaders else _file_loader(settings, columns, chosen, loaders)
    if "train" not in splits:
        raise FedeltaError(f"data source {source} has splits {listed(sorted(loaders))}, expected one named train")
    return splits


def _file_loader(settings: DataSettings, columns: Columns, chosen: str, loaders: Mapping[str, Loader]) -> Loader:
    """A function that reads a split which `data.splits` names by a file, in the folder of the source or elsewhere."""
    if isinstance(settings.source, str) and not settings.source.startswith(PREFIX):
        base = Path(expand_variables(settings.source)).expanduser()
        for folder in (base, base.parent):
            if (folder / chosen).is_file():
                return lambda: read_files(chosen, [folder / chosen], settings, columns.uses)
    if is_path(expand_variables(chosen)):
        paths = chosen_files([chosen])
        return lambda: read_files(chosen, paths, settings, columns.uses)
    source = shorten(settings.title, 100, end=True)
    raise FedeltaError(f"data.splits: {source} has no split {chosen!r}, found {listed(loaders)}; nor is it a file")


def _loaders(settings: DataSettings, columns: Columns) -> dict[str, Loader]:
    """Split of the source → a function that reads it."""
    # The import is slow, and nothing else needs it.
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    if not isinstance(settings.source, str):
        paths = chosen_files(settings.source)
        return {"train": lambda: read_files(settings.title, paths, settings, columns.uses)}
    source = expand_variables(settings.source)
    if source.startswith(PREFIX):
        return {name: lambda table=table: table for name, table in remembered_data(source).items()}  # type: ignore[misc]
    if source in READERS:
        rows = datasets.Dataset.from_list(READERS[source]())
        return {"train": lambda: loaded_table(source, rows)}
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            found = folder_loaders(path, settings, columns.uses)
            own = [name for name in settings.splits.values() if name and (path / name).is_file()]
            return found if found or own else load_hub(str(path), settings.configuration)
        # A path that does not exist must not become a request to a hub.
        if path.exists() or is_path(source):
            paths = expand(source)
            for file in paths:
                if not file.is_file():
                    raise FedeltaError(f"data source {named(file)}: neither a file nor a folder")
            return {"train": lambda: read_files(source, paths, settings, columns.uses)}
        return load_hub(source, settings.configuration)
    except OSError as error:
        raise FedeltaError(f"data source {named(path)}: {error.strerror or in_one_line(error)}") from error


def local_places(settings: DataSettings) -> Iterator[Path]:
    """Yield the files and folders of this machine that the rows come from, whether they exist or not."""
    for source in (settings.source,) if isinstance(settings.source, str) else settings.source:
        if source.startswith(PREFIX) or source in READERS:
            continue
        path = Path(expand_variables(source)).expanduser()
        if is_pattern(str(path)) and not path.exists():
            yield from expand(source)
        else:
            yield path
        for chosen in settings.splits.values():
            if chosen is not None:
                yield from (folder / chosen for folder in (path, path.parent))
                # A missing file is reported when it is read.
                with suppress(FedeltaError):
                    yield from expand(chosen) if is_path(expand_variables(chosen)) else ()
