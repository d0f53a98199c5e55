"""`task.json` beside an adapter: how texts become inputs of the model, so that the adapter works without its run."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from fedelta.learning.model.base_model import BUILT_IN, SMOLLM2
from fedelta.learning.model.model_folder import read_json
from fedelta.runs.config import Config, parse_config

TASK_FILE = "task.json"
DATA_KEYS = ("text", "label", "max_length")


class TaskFacts(NamedTuple):
    """What `task.json` says.

    Args:
        config: a configuration with the task, the names of the columns, the length of a text and the type of the base.
        built_in: name of the base model if it is built into fedelta, else None.
    """

    config: Config
    built_in: str | None


def task_file(config: Config) -> str:
    """Return the content of the file for a run's configuration."""
    data, name = config.data.model_dump(mode="json"), config.model.name
    facts: dict[str, Any] = {
        "task": config.task.model_dump(mode="json"),
        "data": {key: data[key] for key in DATA_KEYS},
        "model": {"dtype": config.model.dtype},
    }
    if name in (*BUILT_IN, SMOLLM2):
        facts["built_in_model"] = name
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"


def read_task_file(folder: Path) -> TaskFacts | None:
    """Read the file in an adapter's folder; None if there is none.

    Raises:
        FedeltaError: if it is damaged.
    """
    file = folder / TASK_FILE
    if not file.is_file():
        return None
    content = read_json(file)
    built_in = content.get("built_in_model")
    config = parse_config({key: content.get(key, {}) for key in ("task", "data", "model")}, str(file))
    return TaskFacts(config, built_in if built_in in (*BUILT_IN, SMOLLM2) else None)
