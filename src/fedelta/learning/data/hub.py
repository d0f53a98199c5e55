"""Data sets of a hub, and copies of their repositories, read by `datasets.load_dataset`."""

from pathlib import Path

from fedelta.errors import FedeltaError
from fedelta.learning.data.files import NAMES, NOT_ROWS, Loader, split_of
from fedelta.learning.data.streams import FORMATS, format_of, named
from fedelta.learning.data.table import listed, loaded_table, say, shorten


def load_hub(source: str, configuration: str | None) -> dict[str, Loader]:
    """Load all splits of a data set on the hub, or of a folder that is a copy of one.

    Raises:
        FedeltaError: if it can't be loaded. The line holds the reason that the library gives.
    """
    import datasets

    if Path(source).is_dir():
        _check_names(Path(source))
    try:
        loaded = dict(datasets.load_dataset(source, configuration))
    except Exception as error:
        lines = str(error.__cause__ or error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise FedeltaError(f"data source {shorten(source, 100, end=True)}: {shorten(reason, 180)}") from error
    if Path(source).is_dir():
        say(
            f"data source {shorten(source, 100, end=True)}: read "
            + listed(f"{k} ({v.num_rows})" for k, v in loaded.items())
        )
    return {name: lambda name=name, rows=rows: loaded_table(f"split {name}", rows) for name, rows in loaded.items()}  # type: ignore[misc]


def _check_names(folder: Path) -> None:
    """Check that each data file in subfolders belongs to a split by an exact name, its own or that of a folder.

    The library would also take `my-test-notes.csv` for a test split. A README that lists the files decides itself.

    Raises:
        FedeltaError: if a file has another name, or there are none.
    """
    files = [file for file in sorted(folder.rglob("*")) if format_of(file) and file.name not in NOT_ROWS]
    if not files:
        raise FedeltaError(
            f"data source {named(folder)}: the folder has no data files, expected train, validation or test as "
            f"{', '.join(FORMATS)}"
        )
    readme = folder / "README.md"
    if readme.is_file() and "data_files" in readme.read_text(errors="replace"):
        return
    parts = {file: file.relative_to(folder) for file in files}
    others = [str(part) for file, part in parts.items() if not split_of(file) and not set(part.parts) & {*NAMES}]
    if others:
        raise FedeltaError(
            f"data source {named(folder)}: {listed(others, 3, 60)}: expected names train, validation or test; "
            "choose the files with data.source: [FILE, …] or a pattern"
        )
