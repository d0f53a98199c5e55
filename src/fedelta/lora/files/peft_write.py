"""Adapters to PEFT folders, one module at a time, and base patches beside them."""

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
    """Writes a folder that plain PEFT loads: one rank and one α for all modules, whatever theirs were.

    Modules of smaller rank are padded with zeros, which leaves their product as it is and spares the reader
    (vLLM, say) a `rank_pattern`. The largest rank is known in the end: if ranks differ, what was written is copied
    once more with its padding, tensor by tensor.

    Args:
        folder: where the two files go; not made here.
        modules: names of all modules that will be added.
        heads: `module.parameter` → tensor of `modules_to_save`.
        config: an `adapter_config.json` whose rank, α and the like are replaced, and all else kept.
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
        """Write one module, of any rank and scale."""
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
        if any(found < rank for found in self._ranks.values()):
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
    """Write a whole adapter.

    Args:
        folder: appears whole, or not at all.
        adapter: of any ranks and scales; a scale that all modules share is kept.
        heads: `module.parameter` → tensor of `modules_to_save`.
        base_model: what `base_model_name_or_path` says.
        modules_to_save: names of the heads' modules.
        fan_in_fan_out: whether the adapted layers are Conv1D.
    """
    import peft

    config = peft.LoraConfig(
        target_modules=sorted(adapter),
        modules_to_save=modules_to_save,
        fan_in_fan_out=fan_in_fan_out,
        task_type=task_type,
        base_model_name_or_path=base_model,
    ).to_dict()
    # PEFT keeps names in a set, whose order differs from process to process; equal runs leave equal files.
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    scales = {pair.scale for pair in adapter.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    with new_folder(folder) as temporary, AdapterWriter(temporary, adapter, heads, config, scale) as writer:
        for module, pair in adapter.items():
            writer.add(module, pair)


class PatchWriter:
    """Writes `base_patch.safetensors`: `<module>.U` (m, q) and `<module>.V` (q, n), so that W + U·V is the new weight.

    Shapes are those of the layer as a Linear, out×in; scales are applied. Without a patch there is no file.

    Args:
        path: of the file.
        modules: that may have a patch.
    """

    def __init__(self, path: Path, modules: Iterable[str]) -> None:
        self._path = path
        self._file = TensorFile(path, [f"{module}.{part}" for module in modules for part in "UV"], {"format": "pt"})
        self._written = False

    def add(self, module: str, product: LowRank) -> None:
        """Write one module's patch."""
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
