"""Limits of this machine, measured in the same run as the results that are compared with them."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from fedelta.sweep.provenance import machine_name

README = Path(__file__).parent / "README.md"


def seconds(work: Callable[[], object], repeats: int = 5, enough: float = 2.0) -> float:
    """Best time of several repetitions after a warm-up. Slow work is repeated less often."""
    begin = time.perf_counter()
    work()
    once = time.perf_counter() - begin
    best = once if once > enough else float("inf")
    for _ in range(0 if once > enough else max(1, min(repeats, int(enough / max(once, 1e-6))))):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best


@dataclass(frozen=True)
class Machine:
    """GEMM rates in FLOP/s, memory bandwidth in bytes/s (read and write together)."""

    fp32: float
    fp64: float
    bandwidth: float

    @classmethod
    def measure(cls) -> "Machine":
        rates = []
        for dtype in (torch.float32, torch.float64):
            X = torch.randn(4096, 4096, dtype=dtype)
            rates.append(2 * 4096**3 / seconds(lambda X=X: X @ X, repeats=3))
        X = torch.randn(8192, 8192)
        Y = torch.empty_like(X)
        return cls(rates[0], rates[1], 2 * X.nbytes / seconds(lambda: Y.copy_(X)))

    def describe(self) -> str:
        return (
            f"{machine_name()}, torch {torch.__version__} with {torch.get_num_threads()} threads, "
            f"{date.today().isoformat()}. Limits measured in the same run: GEMM {self.fp32 / 1e9:.0f} GFLOP/s in fp32, "
            f"{self.fp64 / 1e9:.0f} in fp64; memory {self.bandwidth / 1e9:.0f} GB/s."
        )


def forget(path: Path) -> None:
    """Drop a file from the page cache, so that the next read comes from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def forget_peak() -> None:
    """Reset the peak memory of this process to its current memory."""
    Path("/proc/self/clear_refs").write_text("5")


def table(head: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def keep(part: str, text: str) -> None:
    """Write `text` to the README, between the two comments of this part."""
    begin, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    README.write_text(re.sub(pattern, lambda _: f"{begin}\n\n{text}\n\n{end}", README.read_text(), flags=re.DOTALL))
