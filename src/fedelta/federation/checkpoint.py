"""Save and load a run's checkpoint: one file, replaced atomically.

The file has the format of a message: a safetensors blob with tensors by name and everything else as JSON in the
metadata. It includes the run's configuration, so that a run never resumes under another one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedelta.errors import FedeltaError
from fedelta.federation.server import ServerState
from fedelta.files import write_file
from fedelta.lora.adapter import Adapter
from fedelta.lora.patch_log import PatchLog
from fedelta.methods.method import MethodState
from fedelta.protocol.compression import ErrorFeedback
from fedelta.protocol.serialization import (
    adapter_tensors,
    error_feedback_tensors,
    pack,
    patch_tensors,
    take_adapter,
    take_error_feedback,
    take_patches,
    take_prefix,
    unpack,
    with_prefix,
)

FORMAT = 3


class Checkpoint(NamedTuple):
    """Everything that a run needs to resume.

    Args:
        state: the server's state.
        config: the run's configuration as plain data.
        kept: client → its adapter at the end of its last round, if the method keeps factors at clients.
        error_feedback: client → what compression left out of its last message, if messages are compressed.
    """

    state: ServerState
    config: dict[str, Any]
    kept: dict[str, Adapter]
    error_feedback: dict[str, ErrorFeedback]


def save_checkpoint(
    path: Path,
    state: ServerState,
    config: Mapping[str, Any],
    kept: Mapping[str, Adapter],
    error_feedback: Mapping[str, ErrorFeedback],
) -> None:
    """Write a checkpoint and replace the previous one.

    Args:
        path: the file to write.
        state: the server's state.
        config: the run's configuration as plain data.
        kept: see `Checkpoint`; empty if clients are processes that save their own factors.
        error_feedback: see `Checkpoint`; empty under the same condition.
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
    }
    write_file(path, pack(tensors, facts))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that `save_checkpoint` wrote.

    Raises:
        FedeltaError: if the file is missing, truncated or in another format.
    """
    try:
        tensors, facts = unpack(path.read_bytes())
    except OSError as error:
        raise FedeltaError(f"no checkpoint at {path}: {error.strerror}") from error
    except FedeltaError as error:
        raise FedeltaError(f"checkpoint {path}: {error}") from error
    if facts.get("format") != FORMAT:
        raise FedeltaError(f"checkpoint {path} has format {facts.get('format')}, expected {FORMAT}")
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
    if tensors:
        raise FedeltaError(f"checkpoint {path} holds tensors that nothing reads: {sorted(tensors)[:3]}")
    return Checkpoint(state, facts["config"], kept, error_feedback)
