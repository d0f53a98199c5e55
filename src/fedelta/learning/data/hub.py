"""Data sets of a hub, and copies of their repositories, read by `datasets.load_dataset`."""

from pathlib import Path

from fedelta.errors import FedeltaError
from fedelta.learning.data.files import Loader
from fedelta.learning.data.table import listed, loaded_table, say, shorten


def load_hub(source: str, configuration: str | None) -> dict[str, Loader]:
    """Load all splits of a data set on the hub, or of a folder that is a copy of one.

    Raises:
        FedeltaError: if it can't be loaded. The line holds the reason that the library gives.
    """
    import datasets

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
