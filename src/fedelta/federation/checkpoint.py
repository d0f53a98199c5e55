"""Save and load a run's checkpoint: one file, replaced atomically, and the one before it.

The file has the format of a message: a safetensors blob with tensors by name and everything else as JSON in the
metadata. It includes the run's configuration and the digests of its inputs, so that a run never resumes under others,
and a digest of its own content, so that damage on disk is noticed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedelta.errors import FedeltaError, quantity
from fedelta.federation.records import AcceptedChange, Inputs
from fedelta.federation.server import ServerState
from fedelta.files import write_file
from fedelta.lora.adapter import Adapter
from fedelta.lora.patch_log import PatchLog
from fedelta.methods.method import MethodState
from fedelta.protocol.compression import ErrorFeedback
from fedelta.protocol.serialization import (
    SEAL,
    adapter_tensors,
    error_feedback_tensors,
    pack_sealed,
    patch_tensors,
    take_adapter,
    take_error_feedback,
    take_patches,
    take_prefix,
    unpack_sealed,
    with_prefix,
)

FORMAT = 4
WITHOUT_DIGESTS = 3
"""The format before digests were added. It is still read."""
PREVIOUS = "previous.safetensors"
"""Name of the checkpoint before the newest one, in the same folder."""


class History(NamedTuple):
    """Facts about a run that belong to a checkpoint, but not to the server's state.

    Args:
        inputs: what the run learns from. Empty if it is not known.
        accepted: changes of the inputs that the run was told to accept.
        rounds_digest: digest of the finished rounds' lines of `rounds.jsonl`. None if it is not known.
        generations_digest: digest of the finished rounds' lines of `generations.jsonl`. None if it is not known.
        test_before: scores of the initial model on the test split. None if it was not evaluated.
    """

    inputs: Inputs
    accepted: tuple[AcceptedChange, ...]
    rounds_digest: str | None
    generations_digest: str | None = None
    test_before: Mapping[str, float] | None = None


UNKNOWN = History({}, (), None)
"""The history of a run that has not recorded it."""


class Checkpoint(NamedTuple):
    """Everything that a run needs to resume.

    Args:
        state: the server's state.
        config: the run's configuration as plain data.
        kept: client → its adapter at the end of its last round, if the method keeps factors at clients.
        error_feedback: client → what compression left out of its last message, if messages are compressed.
        history: the inputs and the finished rounds.
    """

    state: ServerState
    config: dict[str, Any]
    kept: dict[str, Adapter]
    error_feedback: dict[str, ErrorFeedback]
    history: History = UNKNOWN


def save_checkpoint(
    path: Path,
    state: ServerState,
    config: Mapping[str, Any],
    kept: Mapping[str, Adapter],
    error_feedback: Mapping[str, ErrorFeedback],
    history: History = UNKNOWN,
) -> None:
    """Write a checkpoint. The one that it replaces is kept beside it, as `PREVIOUS`.

    Args:
        path: the file to write.
        state: the server's state.
        config: the run's configuration as plain data.
        kept: see `Checkpoint`; empty if clients are processes that save their own factors.
        error_feedback: see `Checkpoint`; empty under the same condition.
        history: see `Checkpoint`.

    Raises:
        OSError: naming the file, for example if its folder was removed.
    """
    tensors = adapter_tensors("", state.method.adapter)
    tensors |= with_prefix("memory", state.method.memory) | with_prefix("head", state.heads)
    tensors |= patch_tensors(state.log.entries, state.log.total)
    for client, adapter in kept.items():
        tensors |= adapter_tensors(f"kept/{client}/", adapter)
    for client, feedback in error_feedback.items():
        tensors |= error_feedback_tensors(f"left/{client}", feedback)
    facts = {
        "format": FORMAT,
        "config": config,
        "round": state.round,
        "seed": state.method.seed,
        "kept": {client: next(iter(adapter.values())).scale for client, adapter in kept.items()},
        "error_feedback": {client: feedback.facts for client, feedback in error_feedback.items()},
        "classes": list(state.classes),
        "shapes": {module: list(shape) for module, shape in state.log.shapes.items()},
        "digests": list(state.log.digests),
        "entries": sorted(state.log.entries),
        "dense": state.log.total is not None,
        "ranks": dict(state.ranks),
        "versions": dict(state.versions),
        "first_losses": dict(state.first_losses),
        "history": history._asdict(),
    }
    write_file(path, pack_sealed(tensors, facts), previous=path.with_name(PREVIOUS), make_folder=False)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that `save_checkpoint` wrote.

    Raises:
        FedeltaError: if the file is missing, in another format, or not, to the last bit, what was written.
    """
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise FedeltaError(f"no checkpoint at {path}: {error.strerror}") from error
    try:
        tensors, facts = unpack_sealed(blob, required=False)
        found = facts.get("format")
        if found not in (FORMAT, WITHOUT_DIGESTS):
            raise FedeltaError(f"its format is {str(found)[:20]}, expected {FORMAT}")
        if found == FORMAT and SEAL not in facts:
            raise FedeltaError("damaged: it has no digest")
        checkpoint = _checkpoint(facts, tensors)
    except FedeltaError as error:
        raise FedeltaError(f"checkpoint {path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FedeltaError(f"checkpoint {path}: damaged ({type(error).__name__}: {str(error)[:80]})") from error
    if tensors:
        raise FedeltaError(f"checkpoint {path} holds tensors that nothing reads: {sorted(tensors)[:3]}")
    return checkpoint


def load_newest(
    path: Path, warn: Callable[[str], None], verify: Callable[[Checkpoint], None] = lambda _: None
) -> Checkpoint | None:
    """Load the newest checkpoint that can be used: the file at `path`, or the one before it.

    Args:
        path: file of the newest checkpoint.
        warn: called with one line if the newest one can't be used.
        verify: raises a FedeltaError if a checkpoint does not fit the other files of the run.

    Returns:
        The checkpoint, or None if there is no file.

    Raises:
        FedeltaError: if neither can be used.
    """
    previous = path.with_name(PREVIOUS)
    if not path.exists() and not previous.exists():
        return None
    try:
        verify(checkpoint := load_checkpoint(path))
    except FedeltaError as error:
        if not previous.exists():
            raise
        try:
            verify(checkpoint := load_checkpoint(previous))
        except FedeltaError:
            raise FedeltaError(f"{error}; {PREVIOUS}, the one before it, can't be used either") from error
        warn(f"{error}; continuing from the checkpoint before it, after {quantity(checkpoint.state.round, 'round')}")
    return checkpoint


def _checkpoint(facts: dict[str, Any], tensors: dict[str, Any]) -> Checkpoint:
    """Build a checkpoint from its facts, and remove the tensors that it takes."""
    adapter = take_adapter("", 1.0, tensors)
    entries, total = take_patches(facts["entries"], tensors)
    state = ServerState(
        method=MethodState(
            facts["round"],
            adapter,
            facts["seed"],
            take_prefix("memory", tensors),
        ),
        heads=take_prefix("head", tensors),
        classes=tuple(facts["classes"]),
        log=PatchLog(
            {module: (m, n) for module, (m, n) in facts["shapes"].items()},
            tuple(facts["digests"]),
            entries,
            total if facts["dense"] else None,
        ),
        ranks=facts["ranks"],
        versions=facts["versions"],
        first_losses=facts["first_losses"],
    )
    kept = {client: take_adapter(f"kept/{client}/", scale, tensors) for client, scale in facts["kept"].items()}
    error_feedback = {
        client: take_error_feedback(f"left/{client}", feedback, tensors)
        for client, feedback in facts["error_feedback"].items()
    }
    history = facts.get("history", UNKNOWN._asdict())
    past = History(
        history["inputs"],
        tuple(history["accepted"]),
        history["rounds_digest"],
        history.get("generations_digest"),
        history.get("test_before"),
    )
    return Checkpoint(state, facts["config"], kept, error_feedback, past)
