"""Writing of PEFT folders, one module at a time, and of base patches."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fedelta.files import new_folder
from fedelta.lora.adapter import Adapter, LoraPair, lora_alpha
from fedelta.lora.files.peft_read import CONFIG, PREFIX, WEIGHTS
from fedelta.lora.files.tensor_file import TensorFile
from fedelta.lora.lowrank import LowRank

PATCH = "base_patch.safetensors"
_DRAFT = "draft.safetensors"


class AdapterWriter:
    """Context manager that writes a folder for plain PEFT, with one rank and one α for all modules.

    Modules of smaller rank are padded with zeros. This does not change their product, and readers such as vLLM need no
    `rank_pattern`. The largest rank is known only at the end: if ranks differ, the file is copied once more with the
    padding, tensor by tensor.

    Args:
        folder: existing folder for the two files.
        modules: names of all modules that will be added.
        heads: `module.parameter` → tensor, of `modules_to_save`.
        config: content of an `adapter_config.json`. Rank, α and related keys are replaced; the others are kept.
        scale: s of all modules.
    """

    def __init__(
        self,
        folder: Path,
        modules: Iterable[str],
        heads: Mapping[str, Tensor],
        config: Mapping[str, Any],
        scale: float = 1.0,
    ) -> None:
        self._folder = folder
        self._heads = heads
        self._config = config
        self._scale = scale
        self._ranks: dict[str, int] = {}
        self._names = [_key(module, factor) for module in modules for factor in "AB"]
        self._draft = self._open(_DRAFT)

    def _open(self, name: str) -> TensorFile:
        return TensorFile(self._folder / name, [*self._names, *map(_head_key, self._heads)], {"format": "pt"})

    def add(self, module: str, pair: LoraPair) -> None:
        """Write one module. Its pair may have any rank and scale."""
        pair = pair.with_scale(self._scale)
        self._ranks[module] = pair.rank
        self._draft.write(_key(module, "A"), pair.A)
        self._draft.write(_key(module, "B"), pair.B)

    def __enter__(self) -> "AdapterWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            _write_heads(self._draft, self._heads)
        self._draft.__exit__(kind, error, trace)
        if error is None:
            self._finish(max(self._ranks.values()))

    def _finish(self, rank: int) -> None:
        draft = self._folder / _DRAFT
        if any(each < rank for each in self._ranks.values()):
            with self._open(WEIGHTS) as padded:
                for module in self._ranks:
                    A, B = (self._draft.read(_key(module, factor)) for factor in "AB")
                    missing = rank - len(A)
                    padded.write(_key(module, "A"), torch.nn.functional.pad(A, (0, 0, 0, missing)))
                    padded.write(_key(module, "B"), torch.nn.functional.pad(B, (0, missing)))
                _write_heads(padded, self._heads)
            draft.unlink()
        else:
            draft.replace(self._folder / WEIGHTS)
        self._write_config(rank)

    def _write_config(self, rank: int) -> None:
        alpha = lora_alpha(self._scale, rank)
        config = {
            **self._config,
            "r": rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "use_rslora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            "inference_mode": True,
        }
        (self._folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _key(module: str, factor: str) -> str:
    return f"{PREFIX}{module}.lora_{factor}.weight"


def _head_key(name: str) -> str:
    return f"{PREFIX}{name}"


def _write_heads(file: TensorFile, heads: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(heads.items()):
        file.write(_head_key(name), tensor)


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
    """Write an adapter as a PEFT folder.

    Args:
        folder: written atomically.
        adapter: adapter of any ranks and scales. A scale that all modules share is kept.
        heads: `module.parameter` → tensor, of `modules_to_save`.
        base_model: value of `base_model_name_or_path`.
        modules_to_save: names of the modules of the heads.
        fan_in_fan_out: True if the adapted layers are Conv1D.
        task_type: PEFT's task type.
    """
    import peft

    config = peft.LoraConfig(
        target_modules=sorted(adapter),
        modules_to_save=modules_to_save,
        fan_in_fan_out=fan_in_fan_out,
        task_type=task_type,
        base_model_name_or_path=base_model,
    ).to_dict()
    # PEFT stores names in a set, whose order differs between processes. Sorted, equal runs write equal files.
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    scales = {pair.scale for pair in adapter.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    with new_folder(folder) as temporary, AdapterWriter(temporary, adapter, heads, config, scale) as writer:
        for module, pair in adapter.items():
            writer.add(module, pair)


class PatchWriter:
    """Context manager that writes `base_patch.safetensors`.

    The file has `<module>.U` (m, q) and `<module>.V` (q, n), so that W + U·V is the new weight. Shapes are those of the
    layer as a Linear, out×in; scales are applied. No file is written if no module has a patch.

    Args:
        path: path of the file.
        modules: names of the modules that may have a patch.
    """

    def __init__(self, path: Path, modules: Iterable[str]) -> None:
        self._path = path
        self._file = TensorFile(path, [f"{module}.{part}" for module in modules for part in "UV"], {"format": "pt"})
        self._written = False

    def add(self, module: str, product: LowRank) -> None:
        """Write the patch of one module."""
        self._written = True
        for part, tensor in product.tensors.items():
            self._file.write(f"{module}.{part}", tensor)

    def __enter__(self) -> "PatchWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.forget_unwritten()
        self._file.__exit__(kind, error, trace)
        if not self._written:
            self._path.unlink()
