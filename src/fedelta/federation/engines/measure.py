"""Measure the fastest number of workers and of clients per pass on this machine under its current load."""

import time
from collections.abc import Sequence

import torch

from fedelta.federation.client import Trainer
from fedelta.federation.engines.workers import Result, Workers, can_fork
from fedelta.learning.data import Examples
from fedelta.learning.device import synchronize
from fedelta.learning.training import train
from fedelta.learning.training.flops import gemm_rate
from fedelta.learning.training.stacked import StackedClient, reason_not_to_stack, train_stacked
from fedelta.lora.adapter import initial_adapter
from fedelta.seeds import torch_seed

MIN_SPEEDUP = 1.05
"""More workers, or more clients per pass, are chosen only if they are faster by this factor."""

PROBE_STEPS = 2
"""Training steps of one trial."""

TRIES = 3
"""Number of trials; one of them must succeed. Other processes may use the cores for a moment."""


def total_gemm_rate(workers: Workers, dtype: torch.dtype, device: torch.device) -> float:
    """Measure the FLOP/s of square matrix products in all workers at once.

    Args:
        workers: the workers; each computes products at the same time.
        dtype: dtype of the matrices.
        device: device of the matrices.
    """
    rates = workers.map(lambda _: Result({"rate": gemm_rate(dtype, device)}), [1.0] * workers.count)
    return sum(result.facts["rate"] for result in rates)


def fastest_stack(trainer: Trainer, examples: Examples, ranks: Sequence[int], steps: int = 3) -> int:
    """Find the number of clients per pass that trains the most clients per second.

    The candidates are 1, 2, 4, … and all clients of a round. The search ends at the first candidate that is not
    faster, or that does not fit the device's memory.

    Args:
        trainer: the model to train; its loaded adapter and heads are changed.
        examples: rows for the trials; each client gets as many as its steps need.
        ranks: ranks of the clients of a round.
        steps: training steps of each client in a trial.
    """
    model = trainer.model
    one_by_one_only = trainer.settings.packing or trainer.settings.micro_batch_size is not None
    if one_by_one_only or reason_not_to_stack(model):
        return 1
    heads = model.head_tensors()
    settings = trainer.settings.model_copy(update={"steps": steps})
    rows = min(len(examples), steps * settings.batch_size)
    clients = [
        StackedClient(
            initial_adapter(model.shapes, rank, 0).with_scale(1.0),
            heads,
            examples.select([(i * rows + j) % len(examples) for j in range(rows)]),
            seed=i,
        )
        for i, rank in enumerate(ranks)
    ]

    def one_by_one() -> None:
        model.load(clients[0].adapter, heads)
        train(model, trainer.tokenizer, clients[0].examples, settings, seed=0)

    def stacked(size: int) -> None:
        train_stacked(model, trainer.tokenizer, clients[:size], settings)

    def seconds_each(size: int) -> float:
        begin = time.perf_counter()
        one_by_one() if size == 1 else stacked(size)
        synchronize(model.device)
        return (time.perf_counter() - begin) / size

    best, fastest = 1, min(seconds_each(1) for _ in range(3))
    for size in sorted({*(2**k for k in range(1, len(ranks).bit_length())), len(ranks)} - {1}):
        try:
            seconds = min(seconds_each(size) for _ in range(2))
        except torch.OutOfMemoryError:
            break
        if seconds * MIN_SPEEDUP > fastest:
            break
        best, fastest = size, seconds
    return best


def fastest_workers(trainer: Trainer, examples: Examples) -> int:
    """Find the number of workers that makes the most training steps per second.

    The candidates are 1, 2, 4, … and the number of physical cores. The choice changes only the duration of a run:
    results do not depend on which process trains a client.

    Args:
        trainer: the model to train; its weights are not changed.
        examples: rows for the trials.
    """
    # joblib respects CPU affinity and the limits of a container.
    import joblib

    cores = joblib.cpu_count(only_physical_cores=True)
    if cores < 2 or not can_fork():
        return 1
    rows = list(range(min(len(examples), trainer.settings.batch_size)))

    def probe(task: int) -> Result:  # noqa: ARG001
        model = trainer.model
        with torch_seed(0, model.device):
            model.peft.train()
            # Training a client takes much longer than forking its worker, so a trial must not be too short.
            for _ in range(PROBE_STEPS):
                model.peft(**examples.batch(rows, trainer.tokenizer, model.device)).loss.backward()
        model.peft.zero_grad()
        return Result({})

    def rate(count: int) -> float:
        begin = time.perf_counter()
        for _ in Workers(count).map(probe, [1.0] * count):
            pass
        return count / (time.perf_counter() - begin)

    probe(0)  # warm up
    counts = sorted({*(2**k for k in range(1, cores.bit_length()) if 2**k <= cores), cores})
    best = 1
    for count in counts:
        if not any(rate(count) > MIN_SPEEDUP * rate(best) for _ in range(TRIES)):
            break
        best = count
    return best
