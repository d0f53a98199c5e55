"""Schema of a broadcast's JSON facts, by which a client reads them."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedelta.errors import FedeltaError
from fedelta.protocol.compression import Precision
from fedelta.protocol.serialization import show
from fedelta.settings import first_error

Count = Annotated[int, Field(ge=0)]


class _Facts(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class PlanFacts(_Facts):
    """`FactorPlan` as JSON."""

    down: list[str]
    train: list[str]
    up: list[str]
    keep: list[str]
    prune: bool


class MethodFacts(_Facts):
    """Name and options of the method."""

    name: str
    options: dict[str, Any]


class PatchFacts(_Facts):
    """The fields of `PatchDelta` that are not tensors, and whether it holds the dense sum."""

    start: Count
    end: Count
    digests: dict[str, str]
    dense: bool


class BroadcastFacts(_Facts):
    """The fields of `Broadcast` that are not tensors, and the dtypes of compressed tensors (`changed`)."""

    client: str
    round: Count
    rank: Annotated[int, Field(ge=1)]
    scale: float
    method: MethodFacts
    plan: PlanFacts
    seed: int
    indices: list[int] | None
    wants_validation: bool
    precision: Precision
    changed: dict[str, str]
    patch: PatchFacts


def read_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Validate the facts of a broadcast.

    Raises:
        FedeltaError: if a fact is missing, unknown or of another type, or if a version of the patch has no digest.
    """
    try:
        checked = BroadcastFacts.model_validate(dict(facts))
    except ValidationError as error:
        name, expected, value = first_error(error)
        raise FedeltaError(f"field {name[:80]} of the broadcast: {expected}, found {show(value)}") from error
    patch = checked.patch
    # Compare the number of versions first: a list of versions by their numbers could be endless.
    versions = patch.end - patch.start + 1
    if versions != len(patch.digests) or set(patch.digests) != {str(patch.start + i) for i in range(versions)}:
        raise FedeltaError(
            f"the broadcast goes from base version {show(patch.start)} to {show(patch.end)}, "
            f"but has {len(patch.digests)} digests"
        )
    return checked.model_dump()
