"""The result of a group of modules: their exact mean or sum, or one server step of a method."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedelta.aggregate.folders import Folders
from fedelta.aggregate.gauge import Gauge
from fedelta.aggregate.report import ModuleReport
from fedelta.errors import FedeltaError
from fedelta.lora.adapter import LoraPair
from fedelta.lora.deviation import deviation_from_zero_padding
from fedelta.lora.lowrank import LowRank, Product, add
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import Method, MethodState

_LARGEST = torch.finfo(torch.float32).max
_MEASURED = 2e9
"""Operations that measuring the distance of one module may take; about a second."""


@dataclass(frozen=True, eq=False)
class Result:
    """Adapter pair and base patch of one module, with the errors that its report shows."""

    module: str
    pair: LoraPair
    patch: LowRank | None
    deviation: float | None
    cut: float = 0.0
    distance: float | None = None
    norm: float = 0.0

    def report(self, folders: Folders) -> ModuleReport:
        """Return the module's report."""
        size = self.pair.A.nbytes + self.pair.B.nbytes + (self.patch.nbytes if self.patch else 0)
        width = self.patch.width if self.patch else 0
        ranks = folders.ranks(self.module)
        return ModuleReport(
            module=self.module,
            ranks=(min(ranks), max(ranks)),
            rank=self.pair.rank,
            patch_width=width,
            deviation=self.deviation,
            cut=self.cut,
            distance=self.distance,
            norm=self.norm,
            bytes=size,
        )


class Step:
    """Computes the result of a group of modules.

    Args:
        folders: the folders.
        method: method whose server step is applied; None for the exact mean or sum.
        rank: rank to cut the result to; None keeps the numerical rank.
        single: fold the base patch of a method into the adapter.
    """

    def __init__(self, folders: Folders, method: Method | None, rank: int | None, single: bool) -> None:
        self.folders = folders
        self.method = method
        self.rank = rank
        self.single = single

    def run(self, group: list[str]) -> Iterator[Result]:
        """Yield the result of each module of a group.

        Raises:
            FedeltaError: if a result does not fit into fp32, naming the module and the folder.
        """
        try:
            for result in self._exact(group) if self.method is None else self._of_method(group, self.method):
                yield replace(result, norm=self._norm(result))
        except torch.linalg.LinAlgError as error:
            raise self._too_large(group) from error

    def _exact(self, group: list[str]) -> Iterator[Result]:
        """The mean, or the sum Σ w_i ΔW_i as the difference of a positive and a negative part, each of them a mean."""
        zero, weights = self.folders.zero_adapter(group), self.folders.weights
        gauge = Gauge(None)
        signs = [1, -1] if any(weight < 0 for weight in weights.values) else [1]
        parts = [
            (sign, RankMoments(zero, map(gauge.align, self.folders.contributions(group, sign)), "total"))
            for sign in signs
        ]
        for module in group:
            if not weights.as_sum:
                moments = parts[0][1]
                deviation = None if module in gauge.rescaled else deviation_from_zero_padding(moments, module)
                result = self._folded(module, moments.mean_product(module), _measured(deviation))
                yield replace(result, distance=result.cut)
                continue
            terms = [part.mean_product(module).scaled(sign * part.weight) for sign, part in parts if part.weight]
            # Parts that cancel leave their rounding errors, which are not a result.
            noise = torch.finfo(torch.float32).eps * max(term.norm() for term in terms) if len(terms) > 1 else 0.0
            yield self._folded(module, add(terms), None, weights.factor, noise)

    def _of_method(self, group: list[str], method: Method) -> Iterator[Result]:
        contributions = map(Gauge(method.name).align, self.folders.contributions(group))
        state = MethodState(0, self.folders.start_adapter(group, method))
        moments = method.fold(state, contributions, measured=True, ranks=self.folders.all_ranks)
        after, patches = method.conclude(state, moments)
        for module in group:
            deviation = _measured(deviation_from_zero_padding(moments, module))
            result = self._with_patch(module, after.adapter[module], patches.get(module), deviation)
            yield replace(result, distance=_distance(result, moments.mean_product(module)))

    def _with_patch(self, module: str, pair: LoraPair, patch: Product | None, deviation: float | None) -> Result:
        product = pair.product()
        if self.single:
            return self._folded(module, product if patch is None else add([patch, product]), deviation)
        # A dense patch sums over many clients and has full rank, so an SVD would not shrink it.
        low_rank = patch if patch is None or isinstance(patch, LowRank) else patch.as_product()
        if low_rank is not None and product.is_zero():
            # The method restarts the adapter. The pair that its server sends for merging is the adapter here.
            return Result(module, LoraPair(low_rank.V, low_rank.U), None, deviation)
        if low_rank is not None and self.folders.layers[module].layout.kind != "linear":
            raise FedeltaError(
                f"method {self.method.name if self.method else ''} writes a base patch, and module {module} is not a "
                f"linear layer ({self.folders.layers[module].layout.kind}); add --single to fold it into the adapter"
            )
        return Result(module, pair, low_rank, deviation)

    def _folded(
        self, module: str, whole: Product, deviation: float | None, factor: float = 1.0, noise: float = 0.0
    ) -> Result:
        """Return a matrix times `factor` as one adapter of its numerical rank, cut to the requested rank.

        Args:
            module: name of the module.
            whole: the matrix.
            deviation: passed on to the result.
            factor: factor of the result, which the matrix itself may not hold in fp32.
            noise: singular values of the matrix up to this one are rounding errors.
        """
        svd = whole.svd()
        numerical = min(svd.rank(whole.dtype), int((svd.sigma > noise).sum()))
        svd = replace(svd, sigma=svd.sigma * factor)
        self._check_size(module, svd.sigma)
        rank = numerical if self.rank is None else min(self.rank, numerical)
        product = svd.cut(0, rank, whole.dtype)
        if rank and product.is_zero():
            raise FedeltaError(f"module {module}: the result is about {float(svd.sigma[0]):.0e}, too small for fp32")
        energy = svd.sigma / svd.sigma[0] if rank else svd.sigma
        cut = float(energy[rank:numerical].norm() / energy.norm()) if rank < numerical else 0.0
        # PEFT has no rank 0: a module without a change keeps one rank index of zeros.
        m, n = whole.shape
        pair = LoraPair(product.V, product.U) if rank else LoraPair(torch.zeros(1, n), torch.zeros(m, 1))
        return Result(module, pair, None, deviation, cut)

    def _check_size(self, module: str, sigma: Tensor) -> None:
        largest = float(sigma[0]) if len(sigma) else 0.0
        if not largest <= _LARGEST:
            raise self._too_large([module])

    def _norm(self, result: Result) -> float:
        """Return ‖s·B·A‖_F of the adapter, after a check that it and the patch fit into fp32."""
        sizes = []
        for product in [result.pair.product(), *([result.patch] if result.patch else [])]:
            size = product.norm()
            if not size <= _LARGEST:  # the norm is in fp32, which may overflow earlier than the product
                size = product.to(torch.float64).norm()
            if not size <= _LARGEST:
                raise self._too_large([result.module])
            sizes.append(size)
        return sizes[0]

    def _too_large(self, group: list[str]) -> FedeltaError:
        """Return the error for a result that is not finite, with the module and folder of the largest update."""
        largest, place = -1.0, (group[0], self.folders.active[0].name)
        weights = dict(zip((f.name for f in self.folders.folders), self.folders.weights.values, strict=True))
        for folder in self.folders.active:
            for module, pair in folder.read(group).items():
                size = LowRank(pair.B.double() * pair.scale, pair.A.double()).norm()
                if self.folders.weights.as_sum:
                    size *= abs(weights[folder.name])
                if size > largest or math.isnan(size):
                    largest, place = size, (module, folder.name)
        return FedeltaError(
            f"module {place[0]}: the result does not fit into fp32; the largest update there is that of {place[1]}, of "
            f"norm {largest:.0e}"
        )


def _distance(result: Result, mean: Product) -> float | None:
    """Return how far a result is from the exact mean, relative to it; None where this would take too long."""
    terms: list[Product] = [result.pair.product(), *([result.patch] if result.patch else []), mean.scaled(-1.0)]
    width = sum(term.width for term in terms)
    if width**2 * max(mean.shape) > _MEASURED and not any(not isinstance(term, LowRank) for term in terms):
        return None
    size = mean.norm()
    return _measured(add(terms).norm() / size) if size > 0 else None


def _measured(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
