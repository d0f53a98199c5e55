"""What every settings class shares: unknown keys are refused, values never change.

Each room declares its own settings beside the code that reads them; `config.py` puts them together.
"""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of all settings: frozen, and a key that does not exist is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def quota(share: float, clients: int) -> int:
    """How many of so many clients the share is, rounded to the nearest."""
    return int(share * clients + 0.5)
