"""Report where the time of a run was spent, and how far it is from the limit of the machine."""

import json
from collections import Counter
from dataclasses import dataclass

from fedelta.federation.run_folder import RunFolder
from fedelta.learning.training.flops import TextCost


@dataclass(frozen=True)
class Limit:
    """Limit of the machine: the cost of a text and the rate of matrix products.

    Args:
        training: FLOPs to train on a text without padding.
        evaluation: FLOPs to evaluate a text without padding.
        rate: FLOP/s of all workers together when each multiplies square matrices (GEMM).
        workers: number of workers.
    """

    training: TextCost
    evaluation: TextCost
    rate: float
    workers: int


@dataclass(frozen=True)
class Profile:
    """Time that a run spent in each phase, next to the limit of the machine.

    Args:
        wall: phase of the main process → seconds.
        inside: phase inside the workers → seconds, summed over workers.
        counts: number of texts, tokens and squared lengths, in training and evaluation.
        limit: limit of the machine.
    """

    wall: dict[str, float]
    inside: dict[str, float]
    counts: dict[str, int]
    limit: Limit

    @property
    def training_limit(self) -> float:
        """Seconds that training on texts without padding would take at the GEMM rate."""
        return self.limit.training.of(self.counts) / self.limit.rate

    @property
    def evaluation_limit(self) -> float:
        """Seconds that the server's evaluation of texts without padding would take at the GEMM rate."""
        counts = {name: self.counts[f"evaluated_{name}"] for name in ("texts", "tokens", "squares")}
        return self.limit.evaluation.of(counts) / self.limit.rate

    def to_json(self) -> str:
        """Return the text of `profile.json`."""
        return json.dumps(
            {
                "workers": self.limit.workers,
                "gemm_flops_per_second": self.limit.rate,
                "seconds": self.wall,
                "seconds_in_workers": self.inside,
                "counts": self.counts,
                "limit_seconds": {"training": self.training_limit, "evaluation": self.evaluation_limit},
            },
            indent=2,
        )


def read_profile(folder: RunFolder, limit: Limit) -> Profile:
    """Add up the lines of a run's `timings.jsonl`."""
    wall: Counter[str] = Counter()
    inside: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for timing in folder.timings():
        wall.update(timing["seconds"])
        inside.update(timing["in_workers"])
        counts.update(timing["counts"])
    return Profile(dict(wall), dict(inside), dict(counts), limit)
