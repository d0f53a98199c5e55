"""Base class of all settings: frozen, and unknown keys are an error.

Each package declares its settings beside the code that reads them; `runs/config.py` combines them.
"""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base class of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def quota(share: float, clients: int) -> int:
    """Return `share` of `clients` as a whole number, rounded to the nearest."""
    return int(share * clients + 0.5)
