"""A written adapter is loaded by PEFT before its folder appears under its name.

The base model is usually not here. PEFT matches names and shapes only, so a tree of empty modules stands in for it: on
PyTorch's meta device, which takes no memory. The smallest module of each kind is filled, and its ΔW compared.
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedelta.errors import FedeltaError, in_one_line
from fedelta.lora.adapter import LoraPair
from fedelta.lora.files.layout import Kind
from fedelta.lora.files.peft_read import Layer, parameters_of
from fedelta.lora.files.tensor_names import PREFIX
from fedelta.lora.files.weights import Entry, opened, read_entries

MAX_SAMPLE = 2**22
"""Elements of a weight that is compared. Larger layers of a kind lie in the file as smaller ones do."""


class Samples:
    """The result of the smallest layer of each kind, kept to be compared with what PEFT reads.

    Args:
        layers: all layers of the output.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        chosen: dict[Kind, str] = {}
        for name, layer in layers.items():
            # The last expert of a stack: an order of experts that is wrong shows there.
            if layer.layout.expert == layer.layout.experts - 1 and _size(layer) <= MAX_SAMPLE:
                smallest = chosen.setdefault(layer.layout.kind, name)
                if _size(layer) < _size(layers[smallest]):
                    chosen[layer.layout.kind] = name
        self._names = set(chosen.values())
        self.pairs: dict[str, LoraPair] = {}

    def add(self, name: str, pair: LoraPair) -> None:
        """Keep the pair of a layer if it is a sample."""
        if name in self._names:
            self.pairs[name] = pair


def _size(layer: Layer) -> int:
    return layer.shape[0] * layer.shape[1] * layer.layout.experts


def check_with_peft(folder: Path, layers: Mapping[str, Layer], samples: Samples) -> None:
    """Load a written folder with PEFT and compare names, shapes, and ΔW of the samples.

    Raises:
        FedeltaError: if PEFT does not load exactly what was written.
    """
    import peft

    entries = read_entries(folder, "the result")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns about models that are not of Transformers
            config = peft.PeftConfig.from_pretrained(str(folder))
            filled = {layers[name].layout.module for name in samples.pairs}
            model: Any = peft.PeftModel(_stand_in(layers, entries, config, filled), config, low_cpu_mem_usage=True)
            state = {key: torch.empty(entry.shape, device="meta") for key, entry in entries.items()}
            # The base's own weight of an embedding must be where the factors of a sample are.
            bases = {f"{PREFIX}{module}.base_layer.weight" for module in filled} & entries.keys()
            state |= {key: torch.zeros(entries[key].shape) for key in bases}
            state |= _tensors(folder, layers, samples)
            loaded = peft.set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    except FedeltaError:
        raise
    except Exception as error:  # any error of PEFT means that the folder is not usable
        raise FedeltaError(f"PEFT can't load the result, so it is not written: {in_one_line(error)[:160]}") from error
    missing = [key for key in loaded.missing_keys if "lora_" in key or "modules_to_save" in key]
    for keys, what in ((missing, "miss"), (loaded.unexpected_keys, "not know")):
        if keys:
            raise FedeltaError(f"PEFT would {what} {len(keys)} tensors of the result, so it is not written: {keys[0]}")
    for name, pair in samples.pairs.items():
        expected = pair.scale * (pair.B.double() @ pair.A.double())
        found = _delta(model, layers[name]).double()
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 1e-30):
            raise FedeltaError(f"PEFT reads another update of module {name}, so the result is not written")


def _tensors(folder: Path, layers: Mapping[str, Layer], samples: Samples) -> dict[str, Tensor]:
    """Read the written factors of the samples."""
    entries = read_entries(folder, "the result")
    with opened(folder, "the result") as weights:
        keys = [layers[name].layout.key(factor) for name in samples.pairs for factor in "AB"]
        return {key: weights.read(entries[key]) for key in keys}


def _delta(model: Any, layer: Layer) -> Tensor:
    """ΔW of a layer as PEFT computes it, as an m×n matrix."""
    layout = layer.layout
    module = model.get_submodule(f"{PREFIX}{layout.module}")
    delta: Tensor = module.get_delta_weight("default")
    if layout.kind == "parameter" and delta.ndim == 3:
        delta = delta[layout.expert]
    transposed = layout.kind == "embedding" or (layout.kind == "linear" and module.fan_in_fan_out)
    return delta.T if transposed else delta.reshape(layer.shape)


class _Node(nn.Module):
    """A module without a forward pass."""

    is_gradient_checkpointing = False


def _stand_in(
    layers: Mapping[str, Layer], entries: Mapping[str, Entry], config: Any, filled: Iterable[str]
) -> nn.Module:
    """A tree of modules with the names and shapes of the adapted layers and heads.

    Args:
        layers: all layers of the output.
        entries: tensors of the output's file.
        config: PEFT's configuration of the output.
        filled: modules with memory.
    """
    root = _Node()
    nested: dict[str, list[Layer]] = {}
    for layer in layers.values():
        layout = layer.layout
        if layout.expert:
            continue
        if layout.kind == "parameter":
            owner = layout.module
            while owner.endswith(".base_layer"):
                owner = owner.removesuffix(".base_layer")
            nested.setdefault(owner, []).append(layer)
        else:
            with torch.device("cpu" if layout.module in filled else "meta"):
                _attach(root, layout.module, _leaf(layer, bool(config.fan_in_fan_out)))
    for owner, owned in nested.items():
        _attach_parameters(root, owner, owned, config, filled)
    for key, entry in entries.items():
        name = key.removeprefix(PREFIX)
        if ".lora_" not in name and not name.endswith(".base_layer.weight"):
            module, _, parameter = name.rpartition(".")
            _node(root, module).register_parameter(
                parameter, nn.Parameter(torch.empty(entry.shape, device="meta"), requires_grad=False)
            )
    return root


def _leaf(layer: Layer, transposed: bool) -> nn.Module:
    (m, n), layout = layer.shape, layer.layout
    if layout.kind == "embedding":
        return nn.Embedding(n, m, _weight=torch.zeros(n, m))
    if layout.kind == "convolution":
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(layout.kernel)]
        return convolution(n // torch.Size(layout.kernel).numel(), m, layout.kernel, bias=False)  # type: ignore[arg-type]
    if transposed:
        from transformers.pytorch_utils import Conv1D

        return Conv1D(m, n)
    return nn.Linear(n, m, bias=False)


def _attach_parameters(root: nn.Module, owner: str, owned: list[Layer], config: Any, filled: Iterable[str]) -> None:
    """Add the parameters of a module: PEFT wraps them in order, the first one innermost."""
    names = [each.rpartition(".")[2] for each in parameters_of(owner, vars(config))]
    innermost_first = sorted(owned, key=lambda layer: -layer.layout.module.count(".base_layer"))
    node = _node(root, owner)
    for name, layer in zip(sorted(names), innermost_first, strict=False):
        shape = (layer.layout.experts, *layer.shape) if layer.layout.experts > 1 else layer.shape
        device = "cpu" if any(each.layout.module in filled for each in owned) else "meta"
        node.register_parameter(name, nn.Parameter(torch.zeros(shape, device=device)))


def _node(root: nn.Module, name: str) -> nn.Module:
    """Return the module of this name, with its parents, created where they are missing."""
    node = root
    for part in name.split(".") if name else []:
        if part not in node._modules:
            node.add_module(part, _Node())
        node = node._modules[part]  # type: ignore[assignment]
    return node


def _attach(root: nn.Module, name: str, leaf: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    _node(root, parent).add_module(last, leaf)
