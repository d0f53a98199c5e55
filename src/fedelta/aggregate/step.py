"""The mean of PEFT adapter folders, or one server step of a method on them, from disk to disk.

Modules are processed in groups that fit a fixed amount of memory. For each group the folders are read one after the
other; each is added to the sums and then freed, and the result of the group is written at once. So the memory in use
depends neither on the number of folders nor on the size of the model.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from fedelta.aggregate.folders import Folders
from fedelta.aggregate.module_result import Result, Step
from fedelta.aggregate.report import Aggregation, ModuleReport
from fedelta.errors import FedeltaError
from fedelta.files import new_folder
from fedelta.lora.files.peft_write import PATCH, AdapterWriter, PatchWriter
from fedelta.lora.files.readback import Samples, check_with_peft
from fedelta.methods import Method

GROUP_BYTES = 64 * 2**20
"""Bytes of the sums that are in memory at once, over all workers. Each group opens every folder once."""

MAX_WORKERS = 8
"""Groups at once. With more workers the groups become so small that opening folders takes most of the time."""


def aggregate_folders(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    method: Method | None = None,
    weights: Sequence[float] | None = None,
    as_sum: bool = False,
    rank: int | None = None,
    single: bool = False,
    base: str | None = None,
    strict: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005
) -> Aggregation:
    """Aggregate PEFT adapter folders into one PEFT adapter folder.

    A folder that does not adapt a module changes nothing there, so the mean over all folders is defined.

    Args:
        paths: the folders, all of one base model. The name of an adapter on the Hub is downloaded.
        output: the folder to write. It is read by PEFT before it appears, complete or not at all.
        method: the method whose server step is applied. Its base patch goes into `base_patch.safetensors`. None is the
            exact weighted mean Σ p_i s_i B_i A_i as one adapter of its numerical rank.
        weights: w_i ≥ 0, normalized to p_i; None weighs all folders equally.
        as_sum: write the exact sum Σ w_i s_i B_i A_i, with weights as they are: they may be negative.
        rank: cut the result to this rank by Eckart–Young; with a method this folds its base patch in.
        single: fold the base patch of a method into the adapter, whose rank grows until the result is exact.
        base: name of the base model, if the folders call one model by several names.
        strict: refuse what is otherwise a note: missing modules, repaired names, one base under two paths.
        progress: called with the number of finished modules and the number of all modules.

    Raises:
        FedeltaError: naming the folder, module or weight that does not fit; nothing is written in that case.
    """
    output = Path(output)
    folders, method = _opened(paths, output, method, weights, rank, as_sum, base)
    notes = tuple(folders.notes())
    if strict and notes:
        raise FedeltaError(f"{notes[0]}; refused by --strict")
    reports = _write(folders, Step(folders, method, rank, single or rank is not None), output, progress)
    has_patch = any(report.patch_width for report in reports)
    name = None if method is None else method.name
    return Aggregation(output, name, folders.shares(), reports, has_patch, as_sum, folders.base.name, notes)


def _write(folders: Folders, step: Step, output: Path, progress: Callable[[int, int], None]) -> list[ModuleReport]:
    """Write the output, have it read by PEFT, and return the reports of its modules, sorted by name."""
    folders.check_memory(psutil.virtual_memory().available)
    heads, method = folders.mean_heads(), step.method
    sums = len(folders.all_ranks) if method is not None and method.covariance == "by rank" else 1
    # Dense sums are a few large products: one group at a time is as fast and needs less memory.
    workers = 1 if folders.makes_dense(sums) else min(torch.get_num_threads(), MAX_WORKERS)
    whole = method is not None and not method.by_module
    groups = [list(folders.layers)] if whole else folders.groups(GROUP_BYTES // workers, sums)
    reports: list[ModuleReport] = []
    layouts = [layer.layout for layer in folders.layers.values()]
    samples = Samples(folders.layers)
    with new_folder(output) as temporary:
        with (
            AdapterWriter(temporary, layouts, heads, folders.config()) as adapter_writer,
            PatchWriter(temporary / PATCH, folders.layers) as patch_writer,
        ):
            for results in _in_parallel(step.run, groups, workers):
                for result in results:
                    adapter_writer.add(result.module, result.pair)
                    samples.add(result.module, result.pair)
                    if result.patch is not None:
                        patch_writer.add(result.module, result.patch)
                    reports.append(result.report(folders))
                    progress(len(reports), len(folders.layers))
        check_with_peft(temporary, folders.layers, samples)
    return sorted(reports, key=lambda report: report.module)


def _opened(
    paths: Sequence[str | Path],
    output: Path,
    method: Method | None,
    weights: Sequence[float] | None,
    rank: int | None,
    as_sum: bool,
    base: str | None,
) -> tuple[Folders, Method | None]:
    """Open and check the folders; norm weighting moves from the method into the weights of the folders.

    Raises:
        FedeltaError: naming the folder, module or weight that does not fit.
    """
    if os.path.lexists(output):
        raise FedeltaError(f"{output} already exists, expected a new folder")
    if rank is not None and rank < 1:
        raise FedeltaError(f"rank {rank}, expected at least 1")
    if as_sum and method is not None:
        raise FedeltaError(f"--sum adds adapters up, and a step of {method.name} is a mean; expected one of the two")
    folders = Folders.open(paths, weights, as_sum=as_sum, base=base)
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
    work: Callable[[list[str]], Iterator[Result]], groups: list[list[str]], workers: int
) -> Iterator[Iterable[Result]]:
    """Yield the results of the groups in order; several groups run at once, each with one thread of torch.

    With factors most of the work is copying and small products, and more threads of torch do not speed these up.
    """
    if workers == 1:
        yield from map(work, groups)
        return
    threads = torch.get_num_threads()
    waiting: deque[Future[list[Result]]] = deque()
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
