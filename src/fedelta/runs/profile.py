"""Where the time of a run went, and how far that is from what the machine could do at best."""

import json
from collections import Counter
from dataclasses import dataclass

from fedelta.federation.run_folder import RunFolder
from fedelta.learning.training.flops import TextCost


@dataclass(frozen=True)
class Limit:
    """What this machine could do at best.

    Args:
        training, evaluation: FLOPs of texts without padding.
        rate: FLOP/s of all workers together, each multiplying square matrices.
        workers: their number.
    """

    training: TextCost
    evaluation: TextCost
    rate: float
    workers: int


@dataclass(frozen=True)
class Profile:
    """Args: seconds by phase of the main process and, summed over workers, inside them; counts; what was possible."""

    wall: dict[str, float]
    inside: dict[str, float]
    counts: dict[str, int]
    limit: Limit

    @property
    def training_limit(self) -> float:
        """Seconds that training on texts without padding would take at the rate of the GEMM."""
        return self.limit.training.of(self.counts) / self.limit.rate

    @property
    def evaluation_limit(self) -> float:
        """The same for the server's evaluation."""
        counts = {name: self.counts[f"evaluated_{name}"] for name in ("texts", "tokens", "squares")}
        return self.limit.evaluation.of(counts) / self.limit.rate

    def to_json(self) -> str:
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
    """Sum up a run's `timings.jsonl`."""
    wall: Counter[str] = Counter()
    inside: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for line in folder.timings_file.read_text().splitlines():
        timing = json.loads(line)
        wall.update(timing["seconds"])
        inside.update(timing["in_workers"])
        counts.update(timing["counts"])
    return Profile(dict(wall), dict(inside), dict(counts), limit)
