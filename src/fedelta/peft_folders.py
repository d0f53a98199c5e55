"""Several PEFT folders that belong together: what they must have in common, and their contributions one by one."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedelta.adapter import Adapter, LoraPair
from fedelta.contribution import Contribution
from fedelta.errors import FedeltaError
from fedelta.methods import Method
from fedelta.peft_io import Layer, PeftFolder, open_adapter
from fedelta.product_sum import CHUNK


class Folders:
    """Adapter folders of one base model, with a weight each.

    Args:
        folders: opened and checked one by one.
        weights: w_i.

    Raises:
        FedeltaError: naming the folder that does not fit the first one, and in what.
    """

    def __init__(self, folders: Sequence[PeftFolder], weights: Sequence[float]) -> None:
        self.folders = folders
        self.weights = weights
        first = folders[0]
        for folder in folders[1:]:
            _check_alike(first, folder)
        self.layers = first.layers

    @classmethod
    def open(cls, paths: Sequence[str | Path], weights: Sequence[float] | None) -> "Folders":
        """Read configurations and headers; tensors stay on disk."""
        if not paths:
            raise FedeltaError("no adapter folders, expected at least one")
        weights = [1.0] * len(paths) if weights is None else list(weights)
        if len(weights) != len(paths):
            raise FedeltaError(f"{len(weights)} weights, expected one for each of {len(paths)} folders")
        for weight, path in zip(weights, paths, strict=True):
            if not math.isfinite(weight) or weight < 0:
                raise FedeltaError(f"weight {weight} of {path}: expected a number ≥ 0")
        if sum(weights) <= 0:
            raise FedeltaError("all weights are 0, expected a positive sum")
        return cls([open_adapter(path) for path in paths], weights)

    def shares(self) -> list[tuple[str, float]]:
        """(folder, p_i) in order."""
        total = sum(self.weights)
        return [(str(f.path), w / total) for f, w in zip(self.folders, self.weights, strict=True)]

    def layer(self, module: str) -> list[Layer]:
        return [folder.layers[module] for folder in self.folders]

    def ranks(self, module: str) -> list[int]:
        """Every folder's rank of a module."""
        return [layer.rank for layer in self.layer(module)]

    @property
    def all_ranks(self) -> frozenset[int]:
        return frozenset(layer.rank for folder in self.folders for layer in folder.layers.values())

    def groups(self, budget: int) -> list[list[str]]:
        """The modules in groups whose sums over all folders take at most this many bytes, or of one module."""
        groups: list[list[str]] = []
        left = 0
        for module, layer in self.layers.items():
            # With many folders a sum is a dense matrix and one chunk of factors, and no more.
            m, n = layer.shape
            size = 4 * min(sum(self.ranks(module)) * (m + n), m * n + CHUNK * (m + n))
            if not groups or size > left:
                groups.append([])
                left = budget
            groups[-1].append(module)
            left -= size
        return groups

    def by_norm(self, budget: int) -> "Folders":
        """The same folders with w_i = ‖s_i B_i A_i‖_F over the whole adapter; a weight of 0 stays 0."""
        squares = [0.0] * len(self.folders)
        for group in self.groups(budget):
            for i, folder in enumerate(self.folders):
                squares[i] += sum(product.norm() ** 2 for product in folder.read(group).products().values())
        norms = [square**0.5 if weight else 0.0 for square, weight in zip(squares, self.weights, strict=True)]
        if not sum(norms) > 0:
            raise FedeltaError("all adapters are zero: there is no norm to weigh them by")
        return Folders(self.folders, norms)

    def contributions(self, group: list[str]) -> Iterator[Contribution]:
        """Each folder's part of a group of modules, read when its turn comes."""
        for folder, weight in zip(self.folders, self.weights, strict=True):
            yield Contribution(str(folder.path), weight, folder.read(group))

    def zero_adapter(self, group: list[str]) -> Adapter:
        """Zeros at each module's largest rank: what rank indices are relative to."""
        pairs = {}
        for module in group:
            (m, n), rank = self.layers[module].shape, max(self.ranks(module))
            pairs[module] = LoraPair(torch.zeros(rank, n), torch.zeros(m, rank))
        return Adapter(pairs)

    def start_adapter(self, group: list[str], method: Method) -> Adapter:
        """What the folders started from, as far as the method needs it: the factor that it freezes, and zeros.

        Raises:
            FedeltaError: if the folders do not share the frozen factor.
        """
        zero = self.zero_adapter(group)
        frozen = {"A", "B"} - method.wire(0).train
        if not frozen:
            return zero
        (factor,) = frozen
        largest = max(self.folders, key=lambda folder: max(folder.layers[m].rank for m in group))
        start = largest.read(group)
        for folder in self.folders:
            for module, pair in folder.read(group).items():
                mine, shared = (getattr(p, factor) for p in (pair, start[module].truncate(pair.rank)))
                if mine.shape != shared.shape or not torch.equal(mine, shared):
                    raise FedeltaError(
                        f"{folder.path}: {factor} of module {module} differs from that of {largest.path}; method "
                        f"{method.name} is for clients that share {factor}. The exact mean needs no method"
                    )
        return Adapter(
            {
                m: LoraPair(pair.A, zero[m].B) if factor == "A" else LoraPair(zero[m].A, pair.product().U)
                for m, pair in start.items()
            }
        )

    def check_method(self, method: Method) -> None:
        """Refuse what can't be one server step on these folders."""
        if method.offline:
            raise FedeltaError(f"method {method.name} can't run on folders: {method.offline}")
        if not method.mixed_ranks:
            for module in self.layers:
                ranks = self.ranks(module)
                if len(set(ranks)) > 1:
                    raise FedeltaError(
                        f"method {method.name} needs equal ranks; module {module} has rank {ranks[0]} in "
                        f"{self.folders[0].path} and others elsewhere: {sorted(set(ranks))}"
                    )

    def mean_heads(self) -> dict[str, Tensor]:
        """Σ p_i head_i, in the dtype of the first folder's."""
        sums: dict[str, Tensor] = {}
        dtypes: dict[str, torch.dtype] = {}
        for (_, p), folder in zip(self.shares(), self.folders, strict=True):
            for name, tensor in folder.read_heads().items():
                dtypes.setdefault(name, tensor.dtype)
                sums[name] = sums.get(name, 0) + p * tensor.double()
        return {name: total.to(dtypes[name]) for name, total in sums.items()}

    def config(self) -> dict[str, Any]:
        """The first folder's configuration, with a base model that any of them names."""
        names = (folder.config.get("base_model_name_or_path") for folder in self.folders)
        return {**self.folders[0].config, "base_model_name_or_path": next((name for name in names if name), None)}


def _check_alike(first: PeftFolder, folder: PeftFolder) -> None:
    def refuse(what: str, mine: Any, theirs: Any) -> FedeltaError:
        return FedeltaError(f"{folder.path}: {what} {mine}, but {first.path} has {theirs}; expected the same")

    base, mine = (f.config.get("base_model_name_or_path") for f in (first, folder))
    if base and mine and base != mine:
        raise refuse("base model", mine, base)
    if set(first.layers) != set(folder.layers):
        extra, missing = sorted(set(folder.layers) - set(first.layers)), sorted(set(first.layers) - set(folder.layers))
        odd = f"adapts {extra[0]}" if extra else f"does not adapt {missing[0]}"
        raise FedeltaError(f"{folder.path}: {odd}, unlike {first.path}; expected the same target modules")
    for module, layer in folder.layers.items():
        if layer.shape != first.layers[module].shape:
            raise refuse(f"module {module} is out×in", layer.shape, first.layers[module].shape)
    if bool(first.config.get("fan_in_fan_out")) != bool(folder.config.get("fan_in_fan_out")):
        raise refuse("fan_in_fan_out", folder.config.get("fan_in_fan_out"), first.config.get("fan_in_fan_out"))
    if dict(first.heads) != dict(folder.heads):
        name = sorted(set(first.heads.items()) ^ set(folder.heads.items()))[0][0]
        raise refuse(f"head {name} is", folder.heads.get(name, "missing"), first.heads.get(name, "none"))
