"""Write and read `result.json`, which holds a digest of its own content."""

import json
from pathlib import Path
from typing import Any

from fedelta.errors import FedeltaError
from fedelta.federation.records import Result
from fedelta.federation.schema import check, digest_of
from fedelta.files import write_file
from fedelta.reading import read_json


def write_result(path: Path, result: Result) -> None:
    """Write the file into a folder that exists."""
    whole: dict[str, Any] = {**result, "digest": digest_of(result)}
    write_file(path, json.dumps(whole, indent=2) + "\n", make_folder=False)


def read_result(path: Path) -> Result | None:
    """Read the file; None if there is none.

    Raises:
        FedeltaError: if the file is damaged.
    """
    if not path.exists():
        return None
    try:
        result: Result = check(read_json(path), Result, str(path))
        content = {key: value for key, value in result.items() if key != "digest"}
        if result.get("digest", whole := digest_of(content)) != whole:
            raise FedeltaError("it does not have the digest that was written with it")
    except FedeltaError as error:
        reason = str(error).removeprefix(str(path)).lstrip(": ")
        raise FedeltaError(f"{path} is damaged ({reason}); remove it and rerun with --resume") from error
    return result
