"""PEFT folders that are aggregated together: checks that they match, and their contributions one at a time."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedelta.aggregate.matching import BASE, all_layers, check_heads, check_transposed, common_base, missing_layers
from fedelta.aggregate.weights import Weights, check_weights, scaled_weights
from fedelta.errors import FedeltaError
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.contribution import Contribution
from fedelta.lora.files.peft_read import PeftFolder, open_adapter
from fedelta.lora.running_sum import CHUNK
from fedelta.methods import Method


class Folders:
    """Adapter folders of one base model, each with a weight.

    Args:
        folders: the opened folders, each of them valid.
        weights: w_i, in the order of the folders.
        base: name of the base model, over those in the folders.

    Raises:
        FedeltaError: if a folder does not match the others, naming the folder and the difference.
    """

    def __init__(self, folders: Sequence[PeftFolder], weights: Weights, base: str | None = None) -> None:
        self.folders = folders
        self.weights = weights
        self._override = base
        self.base = common_base(folders, base)
        all_layers(folders)
        # A weight of 0 leaves a folder out: it adds nothing, and has no say in what the output adapts.
        self.active = [f for f, weight in zip(folders, weights.values, strict=True) if weight]
        self.layers = all_layers(self.active)
        check_heads(self.active)
        self._transposed = check_transposed(folders)
        if weights.as_sum and self.active[0].heads and abs(math.fsum(weights.values) - 1) > 1e-9:
            raise FedeltaError(
                f"{self.active[0].name}: head {next(iter(self.active[0].heads))[:80]} is saved whole: its change needs "
                "the base's own head, which is not in the folder; expected --sum with weights that sum to 1"
            )

    @classmethod
    def open(
        cls,
        paths: Sequence[str | Path],
        weights: Sequence[float] | None,
        *,
        as_sum: bool = False,
        base: str | None = None,
    ) -> "Folders":
        """Open folders, reading configurations and headers only; tensors stay on disk.

        Args:
            paths: the folders.
            weights: w_i; None weighs all folders by 1.
            as_sum: whether the result is a sum, which may have negative weights.
            base: name of the base model, over those in the folders.

        Raises:
            FedeltaError: for a folder or weight that is not valid.
        """
        if not paths:
            raise FedeltaError("no adapter folders, expected at least one")
        checked = check_weights([str(path) for path in paths], weights, as_sum)
        return cls([open_adapter(path) for path in paths], checked, base)

    def notes(self) -> list[str]:
        """What was repaired, taken as equal or is missing, a line each."""
        notes = [note for folder in self.folders for note in folder.notes]
        times = Counter(folder.path.resolve() for folder in self.folders)
        notes += [f"{path}: given and counted {number} times" for path, number in times.items() if number > 1]
        return notes + self.base.notes + missing_layers(self.active, self.layers)

    def shares(self) -> list[tuple[str, float]]:
        """(folder, factor) in the order of the folders: w_i / Σ w of a mean, w_i of a sum."""
        return [(f.name, share) for f, share in zip(self.folders, self.weights.shares(), strict=True)]

    def ranks(self, module: str) -> list[int]:
        """Rank of a module in each folder with a weight; 0 if the folder does not adapt it."""
        return [folder.layers[module].rank if module in folder.layers else 0 for folder in self.active]

    @property
    def all_ranks(self) -> frozenset[int]:
        """The ranks of all modules in all folders."""
        return frozenset(layer.rank for folder in self.active for layer in folder.layers.values())

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

    def check_memory(self, available: int) -> None:
        """Raise if the sums of one module can't fit into memory. A header can claim any shape in a small file.

        Args:
            available: bytes that are free.
        """
        for module, layer in self.layers.items():
            # The pairs of one folder, means in float64, and copies of the factors for the SVD.
            size = 6 * min(self._sizes(module, 1)) + 20 * max(self.ranks(module)) * sum(layer.shape)
            if size > available:
                raise FedeltaError(
                    f"module {module}: ranks up to {max(self.ranks(module))} of {layer.shape[0]}×{layer.shape[1]} need "
                    f"about {size / 2**30:.3g} GB of memory, and {available / 2**30:.3g} GB are free"
                )

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
        norms = [square**0.5 if w else 0.0 for square, w in zip(squares, self.weights.values, strict=True)]
        if not sum(norms) > 0:
            raise FedeltaError("all adapters are zero, expected one with a norm to weigh it by")
        return Folders(self.folders, scaled_weights(norms), self._override)

    def contributions(self, group: list[str], sign: int = 1) -> Iterator[Contribution]:
        """Yield the contribution of each folder to a group of modules, read one at a time.

        Args:
            group: the modules.
            sign: 1 for the folders with a positive weight, −1 for those with a negative one, by its size.
        """
        for folder, weight in zip(self.folders, self.weights.scaled, strict=True):
            if weight * sign > 0:
                yield Contribution(folder.name, weight * sign, folder.read(group))

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
            holders = [folder for folder in self.active if module in folder.layers]
            largest = max(holders, key=lambda folder: folder.layers[module].rank)
            start = _absorbed(largest, module)
            for folder in holders:
                pair = _absorbed(folder, module)
                own, shared = (getattr(p, factor) for p in (pair, start.truncate(pair.rank)))
                if not torch.equal(own, shared):
                    raise FedeltaError(
                        f"{folder.name}: {factor} of module {module} differs from that of {largest.name}; method "
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
                        f"{self.active[0].name} and others elsewhere: {sorted(set(ranks))[:8]}"
                    )

    def mean_heads(self) -> dict[str, Tensor]:
        """Average the heads, Σ p_i head_i, in a dtype that holds the dtypes of all folders; integers are rounded."""
        sums: dict[str, Tensor] = {}
        dtypes: dict[str, torch.dtype] = {}
        for (_, share), folder in zip(self.shares(), self.folders, strict=True):
            for name, tensor in folder.read_heads().items() if share else ():
                dtypes[name] = torch.promote_types(dtypes.get(name, tensor.dtype), tensor.dtype)
                sums[name] = sums.get(name, 0) + share * tensor.double()
        return {
            name: (total if dtypes[name].is_floating_point else total.round()).to(dtypes[name])
            for name, total in sums.items()
        }

    def config(self) -> dict[str, Any]:
        """The configuration of the first folder, with the base and with the named modules of all folders."""
        config = dict(self.active[0].config)
        for key in ("modules_to_save", "target_parameters"):
            config[key] = sorted({name for folder in self.active for name in folder.config.get(key) or []})
        return {**config, BASE: self.base.name, "revision": self.base.revision, "fan_in_fan_out": self._transposed}


def _absorbed(folder: PeftFolder, module: str) -> LoraPair:
    """A pair at scale 1, because clients share s·B, not B."""
    return folder.read([module])[module].with_scale(1.0)
