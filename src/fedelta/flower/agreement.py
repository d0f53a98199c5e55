"""The settings that the server and its sites must agree on."""

import json
from typing import Any

from fedelta.runs.config import Config

SITE_SETTINGS = ("model.name", "model.device", "model.activation_cache")
"""Settings that each site chooses: where its model is stored, and what its hardware can do.

All settings of `data` that are not in `SHARED_DATA_SETTINGS` belong to the site as well.
"""

SHARED_DATA_SETTINGS = ("text", "label", "max_length", "client_validation")


def shared_settings(config: Config) -> dict[str, Any]:
    """Return the settings that the server and its sites must agree on, as flat keys and JSON values."""
    plain = json.loads(json.dumps(config.dump()))
    parts = ("task", "lora", "model", "training")
    flat = {f"{part}.{key}": value for part in parts for key, value in plain[part].items()}
    flat |= {"seed": plain["seed"], **{f"data.{key}": plain["data"][key] for key in SHARED_DATA_SETTINGS}}
    return {key: value for key, value in flat.items() if key not in SITE_SETTINGS}
