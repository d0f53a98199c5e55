"""Base class of all settings, and the text of a failed validation.

Each package declares its settings beside the code that reads them; `runs/config.py` combines them.
"""

from pydantic import BaseModel, ConfigDict, ValidationError


class Settings(BaseModel):
    """Base class of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def first_error(error: ValidationError) -> tuple[str, str, object]:
    """Return the first error of a validation.

    Returns:
        The dotted name of the field, what was expected, and the value that was found (None if it is missing).
    """
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    value = None if first["type"] == "missing" else first.get("input")
    return ".".join(map(str, first["loc"])), message[0].lower() + message[1:], value


def quota(share: float, clients: int) -> int:
    """Return `share` of `clients` as a whole number, rounded to the nearest."""
    return int(share * clients + 0.5)
