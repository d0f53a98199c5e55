"""`ServerState` to and from one file, in one atomic step.

The file is a safetensors blob like a message: tensors by name, everything else as JSON in its metadata, with
the configuration that made it, so that a run never goes on under another one.
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

FORMAT = 2


class Checkpoint(NamedTuple):
    """What a run goes on from.

    Args:
        state: the server's.
        config: that made it.
        kept: client → the adapter it ended its last round with, where clients keep factors of their own.
        error_feedback: client → what its last message left out, where messages are rounded.
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
    """Write the state, and what an engine's own clients keep, replacing what was there."""
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
    """Read what `save_checkpoint` wrote.

    Raises:
        FedeltaError: if the file is missing, truncated or of another format.
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
        client: take_error_feedback(f"left/{client}", told, tensors) for client, told in facts["error_feedback"].items()
    }
    if tensors:
        raise FedeltaError(f"checkpoint {path} holds tensors that nothing reads: {sorted(tensors)[:3]}")
    return Checkpoint(state, facts["config"], kept, error_feedback)
