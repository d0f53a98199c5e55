"""How many workers are fastest on this machine, as it is loaded now."""

import time

import torch

from fedelta.client import Trainer
from fedelta.data import Examples
from fedelta.engines.workers import Result, Workers, can_fork
from fedelta.training.flops import gemm_rate

BETTER = 1.05
"""More workers have to be faster by this factor to be taken."""


def total_gemm_rate(workers: Workers, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of square products in all workers at once."""
    rates = workers.map(lambda _: Result({"rate": gemm_rate(dtype, device)}), [1.0] * workers.count)
    return sum(result.facts["rate"] for result in rates)


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
        with torch.random.fork_rng(devices=[]):
            model.peft.train()
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
    best, fastest = 1, max(rate(1), rate(1))
    for count in counts:
        found = max(rate(count), rate(count))
        if found < BETTER * fastest:
            break
        best, fastest = count, found
    return best
