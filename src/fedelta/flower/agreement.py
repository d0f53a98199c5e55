"""The settings that the server and its sites must agree on, and those that are a site's own."""

import json
from typing import Any

from fedelta.runs.config import Config

OWN = ("model.name", "model.device", "model.activation_cache")
"""Settings that are a site's own: where it has its model, and what its machine is. So are those of `data` but these."""


OF_DATA = ("text", "label", "max_length", "client_validation")


def comparable(config: Config) -> dict[str, Any]:
    """What the server and its sites must agree on, as flat keys and values."""
    plain = json.loads(json.dumps(config.dump()))
    parts = ("task", "lora", "model", "training")
    flat = {f"{part}.{key}": value for part in parts for key, value in plain[part].items()}
    flat |= {"seed": plain["seed"], **{f"data.{key}": plain["data"][key] for key in OF_DATA}}
    return {key: value for key, value in flat.items() if key not in OWN}
