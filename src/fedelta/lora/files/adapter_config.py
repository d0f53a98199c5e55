"""`adapter_config.json`: what is read of it, what is refused and why.

Every field of PEFT's `LoraConfig` has one class here. `KEPT` fields describe the model and go into an output. `RESET`
fields describe how the adapter was trained, or are written anew. A `REFUSED` field changes what the adapter computes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedelta.errors import FedeltaError

CONFIG = "adapter_config.json"
MAX_BYTES = 16 * 2**20
MAX_RANK = 2**16
MAX_PATTERNS = 20_000
MAX_MATCHES = 10**7
"""Limit of patterns × modules. A real configuration has fewer than a million."""

REFUSED = {
    "use_dora": "DoRA rescales the weight by a magnitude, so its update is not s·B·A",
    "lora_bias": "a bias on B is not part of s·B·A",
    "layer_replication": "replicated layers do not have their own weight in the base model",
    "use_qalora": "QALoRA pools the input before A",
    "alora_invocation_tokens": "an activated LoRA applies to some tokens only",
    "trainable_token_indices": "trained token embeddings are neither LoRA nor a head",
    "velora_config": "VeLoRA changes what A receives",
    "use_bdlora": "BD-LoRA keeps block-diagonal factors",
    "kasa_config": "KaSA changes the base weight",
    "monteclora_config": "MonteCLoRA samples its factors",
    "arrow_config": "Arrow routes between adapters by token",
    "megatron_config": "a file of Megatron may hold one shard of a layer",
    "ensure_weight_tying": "tied layers share their factors, and a mean does not keep that",
    "bias": "it trains biases of the base",
}
KEPT = (
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "fan_in_fan_out", "lora_dropout"),
    *("modules_to_save", "target_parameters"),
)
RESET = (
    *("peft_type", "peft_version", "inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core"),
    "runtime_config",
)
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, eq=False)
class AdapterConfig:
    """A validated configuration.

    Args:
        fields: content of the file.
        ranks: `r` and `rank_pattern`.
        alphas: `lora_alpha` and `alpha_pattern`.
        ignored: names of fields that this version of PEFT's format does not have.
    """

    fields: Mapping[str, Any]
    ranks: "Pattern"
    alphas: "Pattern"
    ignored: list[str]


class Pattern:
    """A default and exceptions by module, matched as PEFT does: the first key that is a regular expression for the
    end of the module's name.

    Args:
        default: value of modules that no key matches.
        exceptions: regular expression → value.
    """

    def __init__(self, default: Any, exceptions: Mapping[str, Any]) -> None:
        self.default = default
        self._exceptions = [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in exceptions.items()]

    def __len__(self) -> int:
        return len(self._exceptions)

    def matches(self, name: str) -> bool:
        """Return True if a key matches the name."""
        return any(key.match(name) for key, _ in self._exceptions)

    def value(self, module: str) -> Any:
        """Return the value of a module."""
        return next((value for key, value in self._exceptions if key.match(module)), self.default)


def shown(value: Any) -> str:
    """Return a value from a file as text of at most 60 printable characters."""
    text = "".join(c if c.isprintable() else " " for c in repr(value)[:200])
    return text if len(text) <= 60 else text[:57] + "…"


def read_config(folder: Path, name: str) -> AdapterConfig:
    """Read `adapter_config.json` and check that the update is s·B·A.

    Args:
        folder: folder with the file.
        name: name of the folder in errors.

    Raises:
        FedeltaError: naming the field, its value and the reason.
    """
    fields = {"r": 8, "lora_alpha": 8, **_read_json(folder / CONFIG, name)}  # PEFT's defaults
    if fields.get("peft_type") != "LORA":
        kind = shown(fields.get("peft_type")).strip("'") if "peft_type" in fields else "adapter without peft_type"
        raise FedeltaError(f"{name}: {CONFIG}: a {kind} adapter, expected LORA")
    bias = fields.get("bias")
    for key, reason in REFUSED.items():
        if key == "bias" and bias not in (None, "none"):
            raise FedeltaError(f"{name}: bias={shown(bias)} is not supported: {reason}; expected 'none'")
        if key != "bias" and fields.get(key):
            raise FedeltaError(f"{name}: {key} is not supported: {reason}")
    _check_init(fields.get("init_lora_weights"), name)
    for key in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(fields.get(key) or False, bool):
            raise FedeltaError(f"{name}: {CONFIG}: {key} is {shown(fields[key])}, expected true or false")
    if not is_rank(fields["r"]):
        raise FedeltaError(f"{name}: {CONFIG}: r is {shown(fields['r'])}, expected a whole number from 1 to {MAX_RANK}")
    if not is_positive(fields["lora_alpha"]):
        raise FedeltaError(f"{name}: {CONFIG}: lora_alpha is {shown(fields['lora_alpha'])}, expected a positive number")
    ranks = _pattern(fields, "rank_pattern", fields["r"], name)
    alphas = _pattern(fields, "alpha_pattern", fields["lora_alpha"], name)
    for key in ("modules_to_save", "target_parameters"):
        if not _is_names(fields.get(key) or []):
            raise FedeltaError(f"{name}: {CONFIG}: {key} is {shown(fields[key])}, expected a list of names")
    return AdapterConfig(fields, ranks, alphas, _unknown(fields, name))


def is_rank(value: Any) -> bool:
    """Return True for a whole number that can be a LoRA rank."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def is_positive(value: Any) -> bool:
    """Return True for a number above 0 of a size that a scale can have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-30 <= value <= 1e30


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _read_json(file: Path, name: str) -> dict[str, Any]:
    if not file.is_file():  # a pipe would never end
        raise FedeltaError(f"{name}: {CONFIG} is not a file")
    if file.stat().st_size > MAX_BYTES:
        raise FedeltaError(f"{name}: {CONFIG} has more than {MAX_BYTES // 2**20} MB, expected a small JSON file")
    content = file.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise FedeltaError(f"{name}: {CONFIG} is a pointer of Git LFS, not the file itself; run `git lfs pull`")
    try:
        fields = json.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise FedeltaError(f"{name}: {CONFIG} is nested too deeply") from error
    except ValueError as error:
        raise FedeltaError(f"{name}: {CONFIG} is not JSON ({str(error)[:80]})") from error
    if not isinstance(fields, dict):
        raise FedeltaError(f"{name}: {CONFIG} is a {type(fields).__name__}, expected names and values")
    return fields


def _check_init(value: Any, name: str) -> None:
    """Raise unless the initialization left the base weight as it is, so that s·B·A is the whole update."""
    initial = str(value).lower()
    if initial.startswith(_CHANGES_BASE):
        raise FedeltaError(
            f"{name}: init_lora_weights={shown(value)} moves a part of the base weight into the adapter, so its update "
            "is not s·B·A; convert it: save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    if value is not None and not isinstance(value, bool) and initial not in _KEEPS_BASE:
        raise FedeltaError(
            f"{name}: init_lora_weights={shown(value)} is not known here and may change the base weight; expected true "
            f"or one of {', '.join(_KEEPS_BASE)}"
        )


def _pattern(fields: Mapping[str, Any], key: str, default: Any, name: str) -> Pattern:
    """Compile `rank_pattern` or `alpha_pattern`. Expressions that could take very long to match are refused."""
    exceptions = fields.get(key) or {}
    valid, expected = (is_rank, "ranks") if key == "rank_pattern" else (is_positive, "positive numbers")
    if not isinstance(exceptions, dict):
        raise FedeltaError(f"{name}: {CONFIG}: {key} is {shown(exceptions)}, expected names and {expected}")
    if len(exceptions) > MAX_PATTERNS:
        raise FedeltaError(f"{name}: {CONFIG}: {key} has {len(exceptions)} names, expected at most {MAX_PATTERNS}")
    for expression, value in exceptions.items():
        if not valid(value):
            raise FedeltaError(f"{name}: {CONFIG}: {key} of {shown(expression)} is {shown(value)}, expected {expected}")
        if re.search(r"\)[*+?{]", expression) or len(re.findall(r"[*+{]", expression)) > 3:
            raise FedeltaError(
                f"{name}: {CONFIG}: {key} {shown(expression)} repeats too much to be matched safely, expected names "
                "with at most three of * + {}"
            )
    try:
        return Pattern(default, exceptions)
    except (re.error, OverflowError, RecursionError) as error:
        raise FedeltaError(f"{name}: {CONFIG}: {key} has a key that is not a regular expression: {error}") from error


def _unknown(fields: Mapping[str, Any], name: str) -> list[str]:
    """Return the names of unknown fields, which PEFT ignores too.

    Raises:
        FedeltaError: if such a field is switched on, because it may change what the adapter computes.
    """
    known = {*KEPT, *RESET, *REFUSED}
    unknown = sorted(key for key in fields if key not in known)
    for key in unknown:
        if fields[key] is True or (isinstance(fields[key], dict) and fields[key]):
            raise FedeltaError(
                f"{name}: {CONFIG}: {shown(key)} is not known here and may change what the adapter computes; remove it "
                "if it does not"
            )
    return [key for key in unknown if fields[key] not in (None, False, "", [], {})]
