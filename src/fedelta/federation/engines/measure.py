"""How many workers, and how many clients in one pass, are fastest on this machine as it is loaded now."""

import time
from collections.abc import Sequence

import torch

from fedelta.federation.client import Trainer
from fedelta.federation.engines.workers import Result, Workers, can_fork
from fedelta.learning.data import Examples
from fedelta.learning.device import synchronize
from fedelta.learning.training import train
from fedelta.learning.training.flops import gemm_rate
from fedelta.learning.training.stacked import StackedClient, can_stack, train_stacked
from fedelta.lora.adapter import initial_adapter
from fedelta.seeds import torch_seed

BETTER = 1.05
"""More workers, or more clients in one pass, have to be faster by this factor to be taken."""

PROBE_STEPS, TRIES = 2, 3
"""Steps of a trial, and trials of which one has to succeed: somebody else may be busy for a moment."""


def total_gemm_rate(workers: Workers, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of square products in all workers at once."""
    rates = workers.map(lambda _: Result({"rate": gemm_rate(dtype, device)}), [1.0] * workers.count)
    return sum(result.facts["rate"] for result in rates)


def fastest_stack(trainer: Trainer, examples: Examples, ranks: Sequence[int], steps: int = 3) -> int:
    """The number of clients in one pass with the most of them trained a second, out of 1, 2, 4, … and all of a round.

    Args:
        trainer: what its model has loaded is left behind changed.
        examples: of which clients get as many as their steps need.
        ranks: of the clients of a round.
        steps: that each trains.
    """
    model = trainer.model
    if trainer.settings.micro_batch_size is not None or can_stack(model):
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
            found = min(seconds_each(size) for _ in range(2))
        except torch.OutOfMemoryError:
            break
        if found * BETTER > fastest:
            break
        best, fastest = size, found
    return best


def fastest_workers(trainer: Trainer, examples: Examples) -> int:
    """The number of workers with the most training steps a second, out of 1, 2, 4, … and the number of cores.

    It decides nothing but time: results do not depend on where a client trains.
    """
    # joblib knows of affinity masks and of the limits of a container.
    import joblib

    cores = joblib.cpu_count(only_physical_cores=True)
    if cores < 2 or not can_fork():
        return 1
    rows = list(range(min(len(examples), trainer.settings.batch_size)))

    def probe(task: int) -> Result:  # noqa: ARG001
        model = trainer.model
        with torch_seed(0, model.device):
            model.peft.train()
            # A client's training is long beside the birth of its worker, so the trial must not be too short.
            for _ in range(PROBE_STEPS):
                model.peft(**examples.batch(rows, trainer.tokenizer, model.device)).loss.backward()
        model.peft.zero_grad()
        return Result({})

    def rate(count: int) -> float:
        begin = time.perf_counter()
        for _ in Workers(count).map(probe, [1.0] * count):
            pass
        return count / (time.perf_counter() - begin)

    probe(0)  # warm
    counts = sorted({*(2**k for k in range(1, cores.bit_length()) if 2**k <= cores), cores})
    best = 1
    for count in counts:
        if not any(rate(count) > BETTER * rate(best) for _ in range(TRIES)):
            break
        best = count
    return best
