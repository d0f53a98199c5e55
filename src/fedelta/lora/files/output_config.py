"""The `adapter_config.json` of an output: PEFT's own fields, of valid types, for a finished update."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from fedelta.lora.adapter import lora_alpha
from fedelta.lora.files.adapter_config import KEPT
from fedelta.lora.files.layout import Layout


def output_config(
    fields: Mapping[str, Any], layouts: Iterable[Layout], heads: Iterable[str], rank: int, scale: float
) -> str:
    """Return the text of a configuration.

    Training options such as `init_lora_weights` and patterns of ranks do not describe the result and get PEFT's
    defaults. Target modules are named in full: patterns of one input may not match what all inputs adapt.

    Args:
        fields: configuration of an input. Only the fields in `KEPT` are read, and values of a wrong type are left out.
        layouts: layers of the output.
        heads: `module.parameter` of the heads.
        rank: rank of all layers.
        scale: s of all layers.
    """
    import peft

    kept = {key: fields.get(key) for key in KEPT}
    owners = {layout.module for layout in layouts if layout.kind != "parameter"}
    parameters = sorted(set(kept["target_parameters"] or [])) if len(owners) < _modules(layouts) else None
    alpha = lora_alpha(scale, rank)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=sorted(owners),
        target_parameters=parameters,
        modules_to_save=_saved(kept["modules_to_save"], heads),
        base_model_name_or_path=_text(kept["base_model_name_or_path"]),
        revision=_text(kept["revision"]),
        task_type=kept["task_type"] if kept["task_type"] in list(peft.TaskType) else None,
        auto_mapping=_auto_mapping(kept["auto_mapping"]),
        fan_in_fan_out=bool(kept["fan_in_fan_out"]),
        lora_dropout=0.0 if parameters else _dropout(kept["lora_dropout"]),
        inference_mode=True,
    ).to_dict()
    # PEFT stores names in a set, whose order differs between processes. Sorted, equal inputs write equal files.
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _modules(layouts: Iterable[Layout]) -> int:
    return len({layout.module for layout in layouts})


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _dropout(value: Any) -> float:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
    return float(value) if valid else 0.0


def _auto_mapping(value: Any) -> dict[str, str] | None:
    """Keep the class of the base model for `AutoPeftModel`, which imports the library that is named here."""
    if not isinstance(value, dict):
        return None
    names = {key: value.get(key) for key in ("base_model_class", "parent_library")}
    valid = all(isinstance(name, str) for name in names.values())
    return names if valid and str(names["parent_library"]).split(".")[0] == "transformers" else None  # type: ignore


def _saved(value: Any, heads: Iterable[str]) -> list[str] | None:
    """Keep the names in `modules_to_save` that a head has: PEFT fails if a named module is not in the file."""
    heads = [f".{head}." for head in heads]
    return [name for name in value or [] if any(f".{name}." in head for head in heads)] or None
