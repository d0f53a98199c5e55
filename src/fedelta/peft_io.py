"""Adapters to and from PEFT folders: `adapter_config.json` and `adapter_model.safetensors`, nothing else.

A folder that would be read wrongly is refused with the reason: DoRA, `lora_bias`, LoRA on embeddings, pickles.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fedelta.adapter import Adapter, LoraPair, lora_alpha, lora_scale
from fedelta.atomic import new_folder, write_file
from fedelta.errors import FedeltaError

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_REFUSED = {
    "use_dora": "DoRA rescales the weight by a magnitude, so its update is not s·B·A",
    "lora_bias": "a bias on B is not part of s·B·A",
    "layer_replication": "replicated layers have no weight of their own in the base model",
    "use_qalora": "QALoRA pools the input before A",
    "alora_invocation_tokens": "an activated LoRA applies to some tokens only",
    "trainable_token_indices": "trained token embeddings are neither LoRA nor a head",
    "target_parameters": "LoRA on bare parameters is not a module's B·A",
    "velora_config": "VeLoRA changes what A receives",
    "use_bdlora": "BD-LoRA keeps block-diagonal factors",
    "kasa_config": "KaSA changes the base weight",
    "monteclora_config": "MonteCLoRA samples its factors",
    "arrow_config": "Arrow routes between adapters by token",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, eq=False)
class PeftFolder:
    """A PEFT adapter as read.

    Args:
        adapter: with the scale of each module as its config says.
        heads: `module.parameter` → tensor of `modules_to_save`.
        config: the whole `adapter_config.json`.
    """

    adapter: Adapter
    heads: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)


def read_adapter(folder: str | Path) -> PeftFolder:
    """Read a PEFT LoRA folder; ranks and α by module (`rank_pattern`, `alpha_pattern`) and rsLoRA are honoured.

    Raises:
        FedeltaError: naming the folder and what is missing, damaged or not supported.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).is_file():
            raise FedeltaError(
                f"{folder}: {PICKLE} is a pickle, which can run code and is never loaded; open it with PEFT where "
                "you trust it and save it again: model.save_pretrained(folder, safe_serialization=True)"
            )
        raise FedeltaError(f"{folder}: no {WEIGHTS}")
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except (safetensors.SafetensorError, OSError) as error:
        raise FedeltaError(f"{folder / WEIGHTS}: {error}") from error
    A, B, heads = _sort_keys(folder, tensors)
    pairs = {}
    for module in sorted(A | B):
        if module not in A or module not in B:
            raise FedeltaError(f"{folder}: module {module} has no lora_{'A' if module in B else 'B'}")
        for name, factor in (("A", A[module]), ("B", B[module])):
            if factor.ndim != 2:
                raise FedeltaError(f"{folder}: module {module}: {name} is {tuple(factor.shape)}, expected a matrix")
            if not torch.isfinite(factor).all():
                raise FedeltaError(f"{folder}: module {module}: {name} holds NaN or infinite values")
        rank = A[module].shape[0]
        stated = _pattern(config.get("rank_pattern"), module, config["r"])
        if rank != stated:
            raise FedeltaError(f"{folder}: module {module} has rank {rank}, but {CONFIG} says {stated}")
        alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        scale = lora_scale(float(alpha), rank, "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r")
        try:
            pairs[module] = LoraPair(A[module].float(), B[module].float(), scale)
        except FedeltaError as error:
            raise FedeltaError(f"{folder}: module {module}: {error}") from error
    return PeftFolder(Adapter(pairs), heads, config)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FedeltaError(f"{folder}: no such folder")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except OSError as error:
        raise FedeltaError(f"{folder}: no {CONFIG}") from error
    except ValueError as error:
        raise FedeltaError(f"{folder / CONFIG}: not JSON ({error})") from error
    if config.get("peft_type") != "LORA":
        raise FedeltaError(f"{folder}: a {config.get('peft_type')} adapter, expected LORA")
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise FedeltaError(f"{folder}: {key} is not supported: {reason}")
    initial = str(config.get("init_lora_weights")).lower()
    if initial.startswith(_CHANGES_BASE):
        raise FedeltaError(
            f"{folder}: init_lora_weights={initial!r} moved a part of the base weight into the adapter, so its "
            "update is not s·B·A; convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    if config.get("bias", "none") != "none":
        raise FedeltaError(f"{folder}: bias={config['bias']!r} trains biases of the base, expected 'none'")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise FedeltaError(f"{folder / CONFIG}: {key} is {config.get(key)!r}, expected a positive number")
    return config


def _sort_keys(
    folder: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    A, B, heads = {}, {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name == key or "lora_embedding" in name or "lora_magnitude" in name or name.endswith(".base_layer.weight"):
            raise FedeltaError(f"{folder}: tensor {key} is none of lora_A, lora_B or a head, expected no other")
        if name.endswith(".lora_A.weight"):
            A[name.removesuffix(".lora_A.weight")] = tensor
        elif name.endswith(".lora_B.weight"):
            B[name.removesuffix(".lora_B.weight")] = tensor
        elif ".lora_" in name:
            raise FedeltaError(f"{folder}: tensor {key} is not supported: only weights of lora_A and lora_B are")
        else:
            heads[name] = tensor
    if not A:
        raise FedeltaError(f"{folder / WEIGHTS}: no LoRA weights, found {len(tensors)} other tensors")
    return A, B, heads


def _pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    from peft.utils.other import get_pattern_key

    return (pattern or {}).get(get_pattern_key((pattern or {}).keys(), module), default)


def write_adapter(
    folder: Path,
    adapter: Adapter,
    heads: Mapping[str, Tensor],
    *,
    base_model: str,
    modules_to_save: list[str] | None = None,
    fan_in_fan_out: bool = False,
    task_type: str | None = "SEQ_CLS",
) -> None:
    """Write a folder that plain PEFT loads: one rank and one α for all modules, whatever theirs were.

    Modules of smaller rank are padded with zeros, which leaves their product as it is and spares the reader
    (vLLM, say) a `rank_pattern`.

    Args:
        folder: appears whole, or not at all.
        base_model: what `base_model_name_or_path` says.
        modules_to_save: names of the heads' modules.
        fan_in_fan_out: whether the adapted layers are Conv1D.
    """
    import peft

    rank = adapter.rank
    scales = {pair.scale for pair in adapter.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    adapter = adapter.with_scale(scale)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in heads.items()}
    for module, pair in adapter.items():
        missing = rank - pair.rank
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.nn.functional.pad(pair.A, (0, 0, 0, missing))
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.nn.functional.pad(pair.B, (0, missing))
    alpha = lora_alpha(scale, rank)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=sorted(adapter),
        modules_to_save=modules_to_save,
        fan_in_fan_out=fan_in_fan_out,
        task_type=task_type,
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    with new_folder(folder) as temporary:
        config.save_pretrained(str(temporary))
        # PEFT keeps names in a set, whose order differs from process to process; equal runs leave equal files.
        written = json.loads((temporary / CONFIG).read_text()) | {"target_modules": sorted(adapter)}
        (temporary / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
        # Not by save_file, which leaves a file that only its owner can read: an adapter is made to be passed on.
        contiguous = {key: tensor.contiguous() for key, tensor in sorted(tensors.items())}
        write_file(temporary / WEIGHTS, safetensors.torch.save(contiguous, metadata={"format": "pt"}))
