"""`ServerState` to and from one file, in one atomic step.

The file is a safetensors blob like a message: tensors by name, everything else as JSON in its metadata, with
the configuration that made it, so that a run never goes on under another one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedelta.adapter import Adapter, LoraPair
from fedelta.atomic import write_file
from fedelta.errors import FedeltaError
from fedelta.messages import pack, patch_tensors, take_patches, take_prefix, unpack, with_prefix
from fedelta.methods.method import MethodState
from fedelta.patch_log import PatchLog
from fedelta.server import ServerState

FORMAT = 1


def save_checkpoint(path: Path, state: ServerState, config: Mapping[str, Any]) -> None:
    """Write the state, replacing what was there."""
    tensors = with_prefix("A", {module: pair.A for module, pair in state.method.adapter.items()})
    tensors |= with_prefix("B", {module: pair.B for module, pair in state.method.adapter.items()})
    tensors |= with_prefix("memory", state.method.memory) | with_prefix("head", state.heads)
    tensors |= patch_tensors(state.log.entries, state.log.total)
    facts = {
        "format": FORMAT,
        "config": config,
        "round": state.round,
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


def load_checkpoint(path: Path) -> tuple[ServerState, dict[str, Any]]:
    """The state and the configuration that made it.

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
    A, B = take_prefix("A", tensors), take_prefix("B", tensors)
    entries, total = take_patches(facts["entries"], tensors)
    state = ServerState(
        method=MethodState(
            facts["round"], Adapter({m: LoraPair(A[m], B[m]) for m in A}), take_prefix("memory", tensors)
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
    if tensors:
        raise FedeltaError(f"checkpoint {path} holds tensors that nothing reads: {sorted(tensors)[:3]}")
    return state, facts["config"]
