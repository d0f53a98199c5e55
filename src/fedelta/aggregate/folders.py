"""PEFT folders that are aggregated together: checks that they match, and their contributions one at a time."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedelta.errors import FedeltaError, quantity
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.contribution import Contribution
from fedelta.lora.files.peft_read import PeftFolder, open_adapter
from fedelta.lora.running_sum import CHUNK
from fedelta.methods import Method

BASE = "base_model_name_or_path"


class Folders:
    """Adapter folders of one base model, each with a weight.

    Args:
        folders: the opened folders, each of them valid.
        weights: w_i, in the order of the folders.

    Raises:
        FedeltaError: if a folder does not match the first one, naming the folder and the difference.
    """

    def __init__(self, folders: Sequence[PeftFolder], weights: Sequence[float]) -> None:
        self.folders = folders
        self.weights = weights
        first = folders[0]
        named = next((f for f in folders if f.config.get(BASE)), first)
        for folder in folders[1:]:
            if (base := folder.config.get(BASE)) and base != (expected := named.config[BASE]):
                raise _mismatch(folder, "base model", base, named, expected)
            _check_match(first, folder)
        self.layers = first.layers

    @classmethod
    def open(cls, paths: Sequence[str | Path], weights: Sequence[float] | None) -> "Folders":
        """Open folders, reading configurations and headers only; tensors stay on disk.

        Args:
            paths: the folders.
            weights: w_i ≥ 0; None weighs all folders equally.

        Raises:
            FedeltaError: for a folder or weight that is not valid.
        """
        if not paths:
            raise FedeltaError("no adapter folders, expected at least one")
        weights = [1.0] * len(paths) if weights is None else list(weights)
        if len(weights) != len(paths):
            raise FedeltaError(
                f"{quantity(len(weights), 'weight')}, expected one for each of {quantity(len(paths), 'folder')}"
            )
        for weight, path in zip(weights, paths, strict=True):
            if not math.isfinite(weight) or weight < 0:
                raise FedeltaError(f"weight {weight} of {path}: expected a number ≥ 0")
        if sum(weights) <= 0:
            raise FedeltaError("all weights are 0, expected a positive sum")
        return cls([open_adapter(path) for path in paths], weights)

    def shares(self) -> list[tuple[str, float]]:
        """(folder, p_i) in the order of the folders, with p_i = w_i / Σ w."""
        total = sum(self.weights)
        return [(str(f.path), w / total) for f, w in zip(self.folders, self.weights, strict=True)]

    def ranks(self, module: str) -> list[int]:
        """Rank of a module in each folder."""
        return [folder.layers[module].rank for folder in self.folders]

    @property
    def all_ranks(self) -> frozenset[int]:
        """The ranks of all modules in all folders."""
        return frozenset(layer.rank for folder in self.folders for layer in folder.layers.values())

    def groups(self, budget: int, sums: int = 1) -> list[list[str]]:
        """Split the modules into groups whose sums fit the budget; a module that does not fit is a group by itself.

        Args:
            budget: bytes of the sums of a group over all folders.
            sums: number of sums per module, if each of them becomes dense.
        """
        groups: list[list[str]] = []
        left = 0
        for module, layer in self.layers.items():
            factors, dense = self._sizes(module, sums)
            size = min(factors, dense)
            if not groups or size > left:
                groups.append([])
                # The norm and the SVD of a dense sum run in float64, one module at a time.
                m, n = layer.shape
                left = budget - (4 * 24 * m * n if dense < factors else 0)
            groups[-1].append(module)
            left -= size
        return groups

    def makes_dense(self, sums: int = 1) -> bool:
        """Whether the number of folders is so large that a sum over them is smaller as a dense matrix."""
        return any(dense < factors for factors, dense in (self._sizes(module, sums) for module in self.layers))

    def _sizes(self, module: str, sums: int) -> tuple[int, int]:
        """Bytes of a module's sums over all folders: as factors, and as dense matrices with a chunk of factors each."""
        m, n = self.layers[module].shape
        return 4 * sum(self.ranks(module)) * (m + n), 4 * sums * (m * n + CHUNK * (m + n))

    def by_norm(self, budget: int) -> "Folders":
        """Weigh the folders by w_i = ‖s_i B_i A_i‖_F over the whole adapter; a weight of 0 stays 0.

        Raises:
            FedeltaError: if all adapters are zero.
        """
        squares = [0.0] * len(self.folders)
        for group in self.groups(budget):
            for i, folder in enumerate(self.folders):
                squares[i] += folder.read(group).norm_squared
        norms = [square**0.5 if weight else 0.0 for square, weight in zip(squares, self.weights, strict=True)]
        if not sum(norms) > 0:
            raise FedeltaError("all adapters are zero, expected one with a norm to weigh it by")
        return Folders(self.folders, norms)

    def contributions(self, group: list[str]) -> Iterator[Contribution]:
        """Yield the contribution of each folder to a group of modules, read one at a time."""
        for folder, weight in zip(self.folders, self.weights, strict=True):
            yield Contribution(str(folder.path), weight, folder.read(group))

    def zero_adapter(self, group: list[str]) -> Adapter:
        """An adapter of zeros at the largest rank of each module, which defines the rank indices."""
        pairs = {}
        for module in group:
            (m, n), rank = self.layers[module].shape, max(self.ranks(module))
            pairs[module] = LoraPair(torch.zeros(rank, n), torch.zeros(m, rank))
        return Adapter(pairs)

    def start_adapter(self, group: list[str], method: Method) -> Adapter:
        """The adapter that the folders started from, as far as the method needs it: its frozen factor, and zeros.

        Raises:
            FedeltaError: if the folders do not share the frozen factor.
        """
        zero = self.zero_adapter(group)
        frozen = {"A", "B"} - method.factors(0).train
        if not frozen:
            return zero
        (factor,) = frozen
        pairs = {}
        for module in group:
            largest = max(self.folders, key=lambda folder: folder.layers[module].rank)
            start = _absorbed(largest, module)
            for folder in self.folders:
                pair = _absorbed(folder, module)
                own, shared = (getattr(p, factor) for p in (pair, start.truncate(pair.rank)))
                if not torch.equal(own, shared):
                    raise FedeltaError(
                        f"{folder.path}: {factor} of module {module} differs from that of {largest.path}; method "
                        f"{method.name} expects clients that share {factor}. The exact mean needs no method"
                    )
            pairs[module] = LoraPair(start.A, zero[module].B) if factor == "A" else LoraPair(zero[module].A, start.B)
        return Adapter(pairs)

    def check_method(self, method: Method) -> None:
        """Check that the method can run as one server step on these folders.

        Raises:
            FedeltaError: naming the option or module that does not fit.
        """
        if method.offline:
            raise FedeltaError(f"method {method.name} can't run on folders: {method.offline}")
        for option in ("refresh", "server_optimizer"):
            if option in method.options:
                raise FedeltaError(f"--option {option} needs several rounds, and an aggregation is one step")
        if not method.mixed_ranks:
            for module in self.layers:
                ranks = self.ranks(module)
                if len(set(ranks)) > 1:
                    raise FedeltaError(
                        f"method {method.name} needs equal ranks; module {module} has rank {ranks[0]} in "
                        f"{self.folders[0].path} and others elsewhere: {sorted(set(ranks))}"
                    )

    def mean_heads(self) -> dict[str, Tensor]:
        """Average the heads, Σ p_i head_i, in a dtype that holds the dtypes of all folders; integers are rounded."""
        sums: dict[str, Tensor] = {}
        dtypes: dict[str, torch.dtype] = {}
        for (_, p), folder in zip(self.shares(), self.folders, strict=True):
            for name, tensor in folder.read_heads().items():
                dtypes[name] = torch.promote_types(dtypes.get(name, tensor.dtype), tensor.dtype)
                sums[name] = sums.get(name, 0) + p * tensor.double()
        return {
            name: (total if dtypes[name].is_floating_point else total.round()).to(dtypes[name])
            for name, total in sums.items()
        }

    def config(self) -> dict[str, Any]:
        """The configuration of the first folder, with the base model of the first folder that names one."""
        names = (folder.config.get(BASE) for folder in self.folders)
        return {**self.folders[0].config, BASE: next((name for name in names if name), None)}


def _absorbed(folder: PeftFolder, module: str) -> LoraPair:
    """A pair at scale 1, because clients share s·B, not B."""
    return folder.read([module])[module].with_scale(1.0)


def _mismatch(folder: PeftFolder, what: str, found: Any, other: PeftFolder, expected: Any) -> FedeltaError:
    return FedeltaError(f"{folder.path}: {what} {found}, but {other.path} has {expected}; expected the same")


def _check_match(first: PeftFolder, folder: PeftFolder) -> None:
    if set(first.layers) != set(folder.layers):
        extra, missing = sorted(set(folder.layers) - set(first.layers)), sorted(set(first.layers) - set(folder.layers))
        difference = f"adapts {extra[0]}" if extra else f"does not adapt {missing[0]}"
        raise FedeltaError(f"{folder.path}: {difference}, unlike {first.path}; expected the same target modules")
    for module, layer in folder.layers.items():
        if layer.shape != first.layers[module].shape:
            raise _mismatch(folder, f"module {module} is out×in", layer.shape, first, first.layers[module].shape)
    transposed = [bool(f.config.get("fan_in_fan_out")) for f in (folder, first)]
    if transposed[0] != transposed[1]:
        raise _mismatch(folder, "fan_in_fan_out", transposed[0], first, transposed[1])
    if dict(first.heads) != dict(folder.heads):
        name = sorted(set(first.heads.items()) ^ set(folder.heads.items()))[0][0]
        raise _mismatch(
            folder, f"head {name} is", folder.heads.get(name, "missing"), first, first.heads.get(name, "none")
        )
