"""Where the time of a run went, and how far that is from what the machine could do at best."""

import json
from collections import Counter
from dataclasses import dataclass

from rich.table import Table

from fedelta.tracking import RunFolder
from fedelta.training.flops import TextCost


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


def profile_table(profile: Profile) -> Table:
    """Seconds and shares; the clients' time by phase, and what is left of it as waiting."""
    total = sum(profile.wall.values())
    table = Table(title=f"{total:.1f} s in rounds, workers: {profile.limit.workers}", title_justify="left")
    for name in ("phase", "seconds", "share", "of the FLOP limit"):
        table.add_column(name, justify="left" if name == "phase" else "right")

    def add(name: str, seconds: float, limit: float | None = None) -> None:
        share = f"{limit / seconds:.0%}" if limit is not None and seconds > 0 else ""
        table.add_row(name, f"{seconds:.2f}", f"{seconds / total:.0%}" if total else "", share)

    clients = profile.wall.get("clients", 0.0)
    add("clients", clients, profile.training_limit)
    workers = profile.limit.workers
    for phase, seconds in sorted(profile.inside.items(), key=lambda item: -item[1]):
        add(f"  {phase}", seconds / workers)
    add("  waiting", max(0.0, clients - sum(profile.inside.values()) / workers))
    for phase, seconds in profile.wall.items():
        if phase != "clients":
            add(phase, seconds, profile.evaluation_limit if phase == "evaluation" else None)
    tokens, padded = profile.counts.get("tokens", 0), profile.counts.get("padded_tokens", 0)
    rate = profile.limit.rate / 1e9
    table.caption = (
        f"{tokens:,} tokens trained, {padded / max(tokens, 1) - 1:.0%} more with padding. Limit: texts without padding "
        f"at {rate:.0f} GFLOP/s, the rate of square products in all workers"
    )
    table.caption_justify = "left"
    return table
