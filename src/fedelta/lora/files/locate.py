"""Where the adapter is: a folder, its only subfolder with an adapter, a folder of the Hub's cache, or a Hub name."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from fedelta.errors import FedeltaError, in_one_line
from fedelta.lora.files.adapter_config import CONFIG

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
INDEX = f"{WEIGHTS}.index.json"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
_WANTED = [CONFIG, WEIGHTS, INDEX, "adapter_model-*.safetensors"]


class Location(NamedTuple):
    """An adapter's folder.

    Args:
        folder: the folder with `adapter_config.json`.
        name: its name in errors and tables: what the user typed, with the subfolder that was taken.
        note: what was taken instead of the given folder; empty if nothing.
    """

    folder: Path
    name: str
    note: str


def locate(given: str | Path) -> Location:
    """Find the adapter that a path or a Hub name means.

    Raises:
        FedeltaError: naming what is there instead.
    """
    name = str(given)
    try:
        return _locate(name, Path(given))
    except (OSError, ValueError) as error:  # no permission, a name that is too long or has a null byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise FedeltaError(f"{name[:160]}: {reason}") from error


def _locate(name: str, path: Path) -> Location:
    if not os.path.lexists(path) and _is_hub_name(name):
        return Location(_download(name), name, "")
    if path.is_file():
        raise FedeltaError(f"{name}: a file, expected an adapter folder")
    if not path.is_dir():
        broken = path.is_symlink()
        raise FedeltaError(f"{name}: {'a link that leads nowhere' if broken else 'no such folder'}")
    folder = _snapshot(path)
    if os.path.lexists(folder / CONFIG):
        return Location(folder, name, "")
    inside = sorted(each.name for each in folder.iterdir() if (each / CONFIG).is_file())
    if len(inside) == 1:
        return Location(folder / inside[0], str(path / inside[0]), f"{name}: its subfolder {inside[0]} is the adapter")
    if inside:
        names = ", ".join(inside[:4]) + (f" and {len(inside) - 4} more" if len(inside) > 4 else "")
        raise FedeltaError(f"{name}: no {CONFIG}, but adapters in its subfolders {names}: name one of them")
    raise FedeltaError(f"{name}: no {CONFIG}: {_contents(folder)}")


def _contents(folder: Path) -> str:
    """Say what a folder without an adapter is."""
    names = {each.name for each in folder.iterdir()}
    if not names:
        return "the folder is empty"
    if any(name.startswith(("pytorch_model_fsdp", "global_step")) or name.endswith(".distcp") for name in names):
        return "a sharded training checkpoint; gather it and save the adapter by save_pretrained"
    if "config.json" in names:
        return "a whole model, not an adapter"
    if WEIGHTS in names or INDEX in names:
        return f"it has {WEIGHTS} only; both files are needed"
    return "expected the folder that save_pretrained wrote"


def _snapshot(folder: Path) -> Path:
    """Return the folder, or its newest revision if it is a folder of the Hub's cache (`models--owner--name`)."""
    if (folder / CONFIG).exists() or not (folder / "snapshots").is_dir():
        return folder
    main = folder / "refs" / "main"
    if main.is_file():
        return folder / "snapshots" / main.read_text().strip()
    revisions = sorted((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime)
    return revisions[-1] if revisions else folder


def _is_hub_name(name: str) -> bool:
    """Return True for `owner/name` or `owner/name@revision`, unless a local folder `owner` makes it a wrong path."""
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name.split("/")[0]).exists()


def _download(name: str) -> Path:
    """Download the files of an adapter, or find them in the Hub's cache. Pickles are not fetched."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=_WANTED))
    except LocalEntryNotFoundError as error:
        raise FedeltaError(
            f"{name}: no such folder, and the Hub's cache has no adapter of that name (offline, or not reachable)"
        ) from error
    except HfHubHTTPError as error:
        reason = type(error).__name__.removesuffix("Error")
        raise FedeltaError(
            f"{name}: no such folder, and the Hub does not give an adapter of that name ({reason})"
        ) from (error)
    except (OSError, ValueError) as error:
        raise FedeltaError(f"{name}: no such folder, and not from the Hub: {in_one_line(error)[:120]}") from error
