"""Writing of PEFT folders, one module at a time, and of base patches."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.files import new_folder
from fedelta.lora.adapter import Adapter, LoraPair, finite
from fedelta.lora.files.adapter_config import CONFIG
from fedelta.lora.files.layout import Layout, pad_rank, stack
from fedelta.lora.files.locate import WEIGHTS
from fedelta.lora.files.output_config import output_config
from fedelta.lora.files.tensor_file import TensorFile
from fedelta.lora.files.tensor_names import PREFIX
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
        layouts: place of each layer that will be added.
        heads: `module.parameter` → tensor, of `modules_to_save`.
        config: content of an `adapter_config.json`; `output_config` says what is kept of it.
        scale: s of all modules.
    """

    def __init__(
        self,
        folder: Path,
        layouts: Iterable[Layout],
        heads: Mapping[str, Tensor],
        config: Mapping[str, Any],
        scale: float = 1.0,
    ) -> None:
        self._folder = folder
        self._layouts = {layout.layer: layout for layout in layouts}
        self._heads = heads
        self._config = config
        self._scale = scale
        self._ranks: dict[str, int] = {}
        self._stacks: defaultdict[str, dict[int, LoraPair]] = defaultdict(dict)
        # One layout of each module: experts of a stack share two tensors.
        self._modules = {layout.module: layout for layout in self._layouts.values()}
        self._names = [layout.key(factor) for layout in self._modules.values() for factor in "AB"]
        self._draft = self._open(_DRAFT)

    def _open(self, name: str) -> TensorFile:
        return TensorFile(self._folder / name, [*self._names, *map(_head_key, self._heads)], {"format": "pt"})

    def add(self, layer: str, pair: LoraPair) -> None:
        """Write one layer. Its pair may have any rank and scale. Experts are written once a stack is complete.

        Raises:
            FedeltaError: naming the layer whose values are not finite.
        """
        pair = pair.with_scale(self._scale)
        for name, factor in (("A", pair.A), ("B", pair.B)):
            if not finite(factor):
                raise FedeltaError(f"module {layer}: {name} of the result does not fit into {factor.dtype}")
        layout = self._layouts[layer]
        if layout.experts == 1:
            self._write(layout, pair.rank, *layout.tensors(pair.A, pair.B))
            return
        pairs = self._stacks[layout.module]
        pairs[layout.expert] = pair
        if len(pairs) == layout.experts:
            ordered = [pairs[expert] for expert in range(layout.experts)]
            del self._stacks[layout.module]
            A, B = stack([each.A for each in ordered], [each.B for each in ordered])
            self._write(layout, len(A) // layout.experts, A, B)

    def _write(self, layout: Layout, rank: int, A: Tensor, B: Tensor) -> None:
        self._ranks[layout.module] = rank
        self._draft.write(layout.key("A"), A)
        self._draft.write(layout.key("B"), B)

    def __enter__(self) -> "AdapterWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                _write_heads(self._draft, self._heads)
        except FedeltaError as refused:
            self._draft.__exit__(type(refused), refused, None)
            raise
        self._draft.__exit__(kind, error, trace)
        if error is None:
            self._finish(max(self._ranks.values()))

    def _finish(self, rank: int) -> None:
        draft = self._folder / _DRAFT
        if any(each < rank for each in self._ranks.values()):
            with self._open(WEIGHTS) as padded:
                for module in self._ranks:
                    layout = self._modules[module]
                    factors = [self._draft.read(layout.key(factor)) for factor in "AB"]
                    A, B = pad_rank(factors[0], factors[1], layout.experts, rank)
                    padded.write(layout.key("A"), A)
                    padded.write(layout.key("B"), B)
                _write_heads(padded, self._heads)
            draft.unlink()
        else:
            draft.replace(self._folder / WEIGHTS)
        text = output_config(self._config, self._layouts.values(), self._heads, rank, self._scale)
        (self._folder / CONFIG).write_text(text)


def _head_key(name: str) -> str:
    return f"{PREFIX}{name}"


def _write_heads(file: TensorFile, heads: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(heads.items()):
        if tensor.is_floating_point() and not finite(tensor):
            raise FedeltaError(f"head {name}: the result does not fit into {tensor.dtype}")
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
    config = {
        "modules_to_save": modules_to_save,
        "fan_in_fan_out": fan_in_fan_out,
        "task_type": task_type,
        "base_model_name_or_path": base_model,
    }
    scales = {pair.scale for pair in adapter.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    layouts = map(Layout, adapter)
    with new_folder(folder) as temporary, AdapterWriter(temporary, layouts, heads, config, scale) as writer:
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
        """Write the patch of one module.

        Raises:
            FedeltaError: naming the module whose patch is not finite.
        """
        self._written = True
        for part, tensor in product.tensors.items():
            if not finite(tensor):
                raise FedeltaError(f"module {module}: {part} of the base patch does not fit into {tensor.dtype}")
            self._file.write(f"{module}.{part}", tensor)

    def __enter__(self) -> "PatchWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.forget_unwritten()
        self._file.__exit__(kind, error, trace)
        if not self._written:
            self._path.unlink()
