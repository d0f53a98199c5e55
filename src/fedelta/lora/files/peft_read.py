"""Reading of PEFT folders: `adapter_config.json` and safetensors files only. Pickles are never loaded.

A folder whose update is not s·B·A is refused with the reason, as DoRA is (`adapter_config`). Names that a wrapper has
changed are repaired (`tensor_names`). The layers may be linear, embeddings, convolutions or experts (`layout`).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.lora.adapter import Adapter, LoraPair, finite, lora_scale
from fedelta.lora.files.adapter_config import CONFIG, MAX_MATCHES, MAX_RANK, AdapterConfig, read_config
from fedelta.lora.files.layout import Kind, Layout
from fedelta.lora.files.locate import locate
from fedelta.lora.files.tensor_names import PREFIX, Names, sort_names
from fedelta.lora.files.weights import opened, read_entries

__all__ = ["CONFIG", "PREFIX", "Layer", "PeftFolder", "open_adapter"]
_LARGEST = torch.finfo(torch.float32).max


class Layer(NamedTuple):
    """One adapted layer of a folder: its rank, its shape (m, n), out×in, its scale s, and its place in the file."""

    rank: int
    shape: tuple[int, int]
    scale: float
    layout: Layout


@dataclass(frozen=True, eq=False)
class PeftFolder:
    """A PEFT adapter with a validated configuration and header. Tensors are read on demand.

    Args:
        path: the folder.
        name: its name in errors and tables: what the user typed.
        config: content of `adapter_config.json`.
        layers: layer → rank, shape and scale, including `rank_pattern`, `alpha_pattern` and rsLoRA. The name of a layer
            is that of its module; expert e of a stack is `module[e]`.
        heads: `module.parameter` → shape, of the tensors of `modules_to_save`.
        notes: what was repaired or left out, a line each.
        names: where the tensors are.
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    layers: Mapping[str, Layer]
    heads: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...]
    names: Names

    def read(self, layers: Iterable[str] | None = None) -> Adapter:
        """Read the pairs of some or all layers, in fp32.

        Args:
            layers: names of the layers; None reads all. Names that the folder does not have are left out.

        Raises:
            FedeltaError: naming the layer that holds NaN or values whose product does not fit into fp32.
        """
        pairs = {}
        last, A, B = "", torch.empty(0), torch.empty(0)
        with opened(self.path, self.name) as weights:
            for name in self.layers if layers is None else layers:
                if name not in self.layers:
                    continue
                layer = self.layers[name]
                if layer.layout.module != last:  # a stack of experts is read once
                    last = layer.layout.module
                    A, B = (weights.read(each[last]).float() for each in (self.names.A, self.names.B))
                    self._check_values(last, A, B, layer)
                pairs[name] = LoraPair(*layer.layout.matrices(A, B), layer.scale)
        return Adapter(pairs)

    def _check_values(self, module: str, A: Tensor, B: Tensor, layer: Layer) -> None:
        largest = layer.scale * layer.rank
        for name, factor in (("A", A), ("B", B)):
            low, high = (float(value) for value in factor.aminmax())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise FedeltaError(f"{self.name}: module {module}: {name} holds NaN or infinite values")
            largest *= max(-low, high)
        if largest > _LARGEST:
            raise FedeltaError(
                f"{self.name}: module {module}: the update s·B·A reaches {largest:.0e}, more than fp32 holds"
            )

    def read_heads(self) -> dict[str, Tensor]:
        """Read the heads: `module.parameter` → tensor.

        Raises:
            FedeltaError: naming the head that holds NaN or infinite values.
        """
        heads = {}
        with opened(self.path, self.name) as weights:
            for name, entry in self.names.heads.items():
                heads[name] = weights.read(entry)
                if heads[name].is_floating_point() and not finite(heads[name]):
                    raise FedeltaError(f"{self.name}: head {name} holds NaN or infinite values")
        return heads


def open_adapter(folder: str | Path) -> PeftFolder:
    """Read the configuration and header of a PEFT LoRA folder and check that they are consistent.

    Args:
        folder: the folder, one with a single adapter in a subfolder, or the name of an adapter on the Hub.

    Raises:
        FedeltaError: naming the folder and what is missing, damaged or not supported.
    """
    location = locate(folder)
    path, name = location.folder, location.name
    config = read_config(path, name)
    names = sort_names(name, read_entries(path, name))
    patterns = len(config.ranks) + len(config.alphas) + len(config.fields.get("target_parameters") or [])
    if patterns * len(names.A) > MAX_MATCHES:
        raise FedeltaError(f"{name}: {CONFIG}: too many patterns for {len(names.A)} modules")
    layers: dict[str, Layer] = {}
    for module in sorted(names.A.keys() | names.B.keys()):
        for layer in _layers(name, config, module, names):
            layers[layer.layout.layer] = layer
    notes = [location.note] if location.note else []
    if names.repairs:
        notes.append(f"{name}: {'; '.join(names.repairs)}")
    if config.ignored:
        rest = f" and {len(config.ignored) - 4} more" if len(config.ignored) > 4 else ""
        notes.append(f"{name}: {CONFIG}: ignored, as PEFT does: {', '.join(config.ignored[:4])[:120]}{rest}")
    heads = {head: entry.shape for head, entry in names.heads.items()}
    return PeftFolder(path, name, config.fields, layers, heads, tuple(notes), names)


def _layers(folder: str, config: AdapterConfig, module: str, names: Names) -> list[Layer]:
    """Return the layer of a module, or those of its experts.

    Raises:
        FedeltaError: if the shapes do not fit each other, or the configuration.
    """
    where = f"{folder}: module {module}"
    if module not in names.A or module not in names.B:
        raise FedeltaError(f"{where} has no lora_{'A' if module in names.B else 'B'}")
    A, B = names.A[module], names.B[module]
    kind = _kind(folder, config, module, names)
    for name, entry in (("A", A), ("B", B)):
        if len(entry.shape) != 2 and kind != "convolution":
            raise FedeltaError(f"{where}: {name} is {entry.shape}, expected a matrix; shards of FSDP must be gathered")
    if A.shape[0] != B.shape[1]:
        grouped = ": convolutions with groups are not supported" if kind == "convolution" else ""
        raise FedeltaError(f"{where}: A {A.shape} and B {B.shape} do not share a rank{grouped}")
    # PEFT matches patterns with the name of a parameter, and `_kind` has seen that none does.
    stated = config.ranks.default if kind == "parameter" else config.ranks.value(module)
    alpha = config.alphas.default if kind == "parameter" else config.alphas.value(module)
    experts = A.shape[0] // stated if kind == "parameter" else 1
    rank = A.shape[0] // experts if experts else A.shape[0]
    if rank != stated or rank * experts != A.shape[0]:
        raise FedeltaError(f"{where} has rank {rank}, but {CONFIG} says {stated}")
    if rank > MAX_RANK:
        raise FedeltaError(f"{where} has rank {rank}, expected at most {MAX_RANK}")
    rule: Any = "alpha/sqrt(r)" if config.fields.get("use_rslora") else "alpha/r"
    scale = lora_scale(float(alpha), rank, rule)
    shape = (B.shape[0], math.prod(A.shape[1:]))
    return [Layer(rank, shape, scale, Layout(module, kind, e, experts, A.shape[2:])) for e in range(experts)]


def _kind(folder: str, config: AdapterConfig, module: str, names: Names) -> Kind:
    if module in names.embeddings:
        return "embedding"
    A, B = names.A[module], names.B[module]
    parameters = parameters_of(module, config.fields)
    if parameters:
        patterned = [each for each in parameters if config.ranks.matches(each) or config.alphas.matches(each)]
        if patterned:
            raise FedeltaError(
                f"{folder}: rank_pattern or alpha_pattern of the parameter {patterned[0]} is not supported: the file "
                "does not say which parameter a factor belongs to"
            )
        return "parameter"
    if module.endswith(".base_layer"):
        raise FedeltaError(f"{folder}: module {module} is a layer inside another adapter, expected target_parameters")
    convolution = len(A.shape) in (3, 4, 5) and len(A.shape) == len(B.shape) and set(B.shape[2:]) == {1}
    return "convolution" if convolution else "linear"


def parameters_of(module: str, config: Mapping[str, Any]) -> list[str]:
    """Return the `target_parameters` that lie in a module; empty if its factors are those of the module itself.

    PEFT nests the factors of several parameters of one module: their modules are `m`, `m.base_layer`, and so on.
    """
    owner = module
    while owner.endswith(".base_layer"):
        owner = owner.removesuffix(".base_layer")
    result = []
    for parameter in config.get("target_parameters") or []:
        parent = parameter.rpartition(".")[0]
        inside = owner == parent or owner.endswith(f".{parent}")
        if inside if parent else not _is_target(owner, config.get("target_modules")):
            result.append(parameter)
    return result


def _is_target(module: str, targets: Any) -> bool:
    """Return True if a list of `target_modules` has a module. A regular expression has it unless it says otherwise."""
    if not isinstance(targets, list):
        return targets is not None
    return any(module == each or module.endswith(f".{each}") for each in map(str, targets))
