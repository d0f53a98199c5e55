"""The mean of PEFT adapter folders, or one server step of a method on them, from disk to disk.

Modules are processed in groups that fit a fixed amount of memory. For each group the folders are read one after the
other; each is added to the sums and then freed, and the result of the group is written at once. So the memory in use
depends neither on the number of folders nor on the size of the model.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedelta.aggregate.folders import Folders
from fedelta.errors import FedeltaError
from fedelta.files import new_folder
from fedelta.lora.adapter import LoraPair
from fedelta.lora.deviation import deviation_from_zero_padding
from fedelta.lora.files.peft_write import PATCH, AdapterWriter, PatchWriter
from fedelta.lora.lowrank import LowRank, Product, add
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import Method, MethodState

GROUP_BYTES = 64 * 2**20
"""Bytes of the sums that are in memory at once, over all workers. Each group opens every folder once."""

MAX_WORKERS = 8
"""Groups at once. With more workers the groups become so small that opening folders takes most of the time."""


@dataclass(frozen=True)
class ModuleReport:
    """The result for one module.

    Args:
        module: name of the module.
        ranks: smallest and largest rank among the folders.
        rank: rank of the resulting adapter.
        patch_width: width of the resulting base patch; 0 without one.
        deviation: ‖ΔW − B̄Ā‖_F / ‖ΔW‖_F, with ΔW the exact mean Σ p_i s_i B_i A_i and B̄, Ā the plain averages, missing
            rank indices counted as zeros.
        cut: relative error ‖ΔW − result‖_F / ‖ΔW‖_F of the cut to the requested rank; 0 without one.
        bytes: bytes of this module in the output.
    """

    module: str
    ranks: tuple[int, int]
    rank: int
    patch_width: int
    deviation: float
    cut: float
    bytes: int


@dataclass(frozen=True)
class Aggregation:
    """The result of `aggregate_folders`.

    Args:
        output: the folder that was written.
        method: name of the method; None for the exact mean.
        clients: (folder, p_i) in the order of the folders.
        modules: one report per module, sorted by name.
        patch: whether the folder holds a base patch next to the adapter.
    """

    output: Path
    method: str | None
    clients: list[tuple[str, float]]
    modules: list[ModuleReport]
    patch: bool


def aggregate_folders(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    method: Method | None = None,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    single: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005
) -> Aggregation:
    """Aggregate PEFT adapter folders into one PEFT adapter folder.

    Args:
        paths: the folders, all of one base model and with the same adapted modules.
        output: the folder to write. It appears complete, or not at all.
        method: the method whose server step is applied. Its base patch goes into `base_patch.safetensors`. None is the
            exact weighted mean Σ p_i s_i B_i A_i as one adapter of its numerical rank.
        weights: w_i ≥ 0, normalized to p_i; None weighs all folders equally.
        rank: cut the result to this rank by Eckart–Young; with a method this folds its base patch in.
        single: fold the base patch of a method into the adapter, whose rank grows until the result is exact.
        progress: called with the number of finished modules and the number of all modules.

    Raises:
        FedeltaError: naming the folder, module or weight that does not fit; nothing is written in that case.
    """
    output = Path(output)
    folders, method = _opened(paths, output, method, weights, rank)
    heads = folders.mean_heads()
    step = _Step(folders, method, rank, single or rank is not None)
    sums = len(folders.all_ranks) if method is not None and method.covariance == "by rank" else 1
    # Dense sums are a few large products: one group at a time is as fast and needs less memory.
    workers = 1 if folders.makes_dense(sums) else min(torch.get_num_threads(), MAX_WORKERS)
    whole = method is not None and not method.by_module
    groups = [list(folders.layers)] if whole else folders.groups(GROUP_BYTES // workers, sums)
    reports: list[ModuleReport] = []
    with (
        new_folder(output) as temporary,
        AdapterWriter(temporary, folders.layers, heads, folders.config()) as adapter_writer,
        PatchWriter(temporary / PATCH, folders.layers) as patch_writer,
    ):
        for results in _in_parallel(step.run, groups, workers):
            for result in results:
                adapter_writer.add(result.module, result.pair)
                if result.patch is not None:
                    patch_writer.add(result.module, result.patch)
                reports.append(result.report(folders))
                progress(len(reports), len(folders.layers))
    has_patch = any(report.patch_width for report in reports)
    name = None if method is None else method.name
    return Aggregation(output, name, folders.shares(), sorted(reports, key=lambda r: r.module), has_patch)


def _opened(
    paths: Sequence[str | Path],
    output: Path,
    method: Method | None,
    weights: Sequence[float] | None,
    rank: int | None,
) -> tuple[Folders, Method | None]:
    """Open and check the folders; norm weighting moves from the method into the weights of the folders.

    Raises:
        FedeltaError: naming the folder, module or weight that does not fit.
    """
    if output.exists():
        raise FedeltaError(f"{output} already exists, expected a new folder")
    if rank is not None and rank < 1:
        raise FedeltaError(f"rank {rank}, expected at least 1")
    folders = Folders.open(paths, weights)
    if method is None:
        return folders, None
    folders.check_method(method)
    if not method.norm_weighting:
        return folders, method
    if weights is not None:
        raise FedeltaError(f"method {method.name} weighs adapters by their norm, expected no weights")
    # The norm covers the whole adapter and needs its own pass; after that, modules are independent.
    return folders.by_norm(GROUP_BYTES), replace(method, norm_weighting=False)


def _in_parallel(
    work: Callable[[list[str]], Iterator["_Result"]], groups: list[list[str]], workers: int
) -> Iterator[Iterable["_Result"]]:
    """Yield the results of the groups in order; several groups run at once, each with one thread of torch.

    With factors most of the work is copying and small products, and more threads of torch do not speed these up.
    """
    if workers == 1:
        yield from map(work, groups)
        return
    threads = torch.get_num_threads()
    waiting: deque[Future[list[_Result]]] = deque()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for group in groups:
                waiting.append(pool.submit(lambda group: list(work(group)), group))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


@dataclass(frozen=True, eq=False)
class _Result:
    """Adapter pair and base patch of one module, with the errors that its report shows."""

    module: str
    pair: LoraPair
    patch: LowRank | None
    deviation: float
    cut: float

    def report(self, folders: Folders) -> ModuleReport:
        size = self.pair.A.nbytes + self.pair.B.nbytes + (self.patch.nbytes if self.patch else 0)
        width = self.patch.width if self.patch else 0
        ranks = folders.ranks(self.module)
        return ModuleReport(
            self.module, (min(ranks), max(ranks)), self.pair.rank, width, self.deviation, self.cut, size
        )


class _Step:
    """Computes the result of a group of modules."""

    def __init__(self, folders: Folders, method: Method | None, rank: int | None, single: bool) -> None:
        self.folders = folders
        self.method = method
        self.rank = rank
        self.single = single

    def run(self, group: list[str]) -> Iterator[_Result]:
        contributions = self.folders.contributions(group)
        if self.method is None:
            moments = RankMoments(self.folders.zero_adapter(group), contributions, "total")
            for module in group:
                yield self._single(module, moments.mean_product(module), deviation_from_zero_padding(moments, module))
            return
        state = MethodState(0, self.folders.start_adapter(group, self.method))
        moments = self.method.fold(state, contributions, measured=True, ranks=self.folders.all_ranks)
        after, patch = self.method.conclude(state, moments)
        for module in group:
            deviation = deviation_from_zero_padding(moments, module)
            yield self._of_method(module, after.adapter[module], patch.get(module), deviation)

    def _of_method(self, module: str, pair: LoraPair, patch: Product | None, deviation: float) -> _Result:
        product = pair.product()
        if self.single:
            return self._single(module, product if patch is None else add([patch, product]), deviation)
        # A dense patch sums over many clients and has full rank, so an SVD would not shrink it.
        low_rank = patch if patch is None or isinstance(patch, LowRank) else patch.as_product()
        if low_rank is not None and product.is_zero():
            # The method restarts the adapter. The pair that its server sends for merging is the adapter here.
            return _Result(module, LoraPair(low_rank.V, low_rank.U), None, deviation, 0.0)
        return _Result(module, pair, low_rank, deviation, 0.0)

    def _single(self, module: str, whole: Product, deviation: float) -> _Result:
        svd = whole.svd()
        numerical = svd.rank(whole.dtype)
        rank = numerical if self.rank is None else min(self.rank, numerical)
        product = svd.cut(0, rank, whole.dtype)
        squares = svd.sigma.square()
        cut = float((squares[rank:numerical].sum() / squares.sum()).sqrt()) if rank < numerical else 0.0
        # PEFT has no rank 0: a module without a change keeps one rank index of zeros.
        m, n = whole.shape
        pair = LoraPair(product.V, product.U) if rank else LoraPair(torch.zeros(1, n), torch.zeros(m, 1))
        return _Result(module, pair, None, deviation, cut)
