"""Time limit and report of the GPU benchmark. The report is rewritten after every figure."""

import gc
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from machine import table

from fedelta.errors import in_one_line
from fedelta.files import write_file
from fedelta.learning.device import synchronize
from fedelta.learning.training.flops import gemm_rate
from fedelta.sweep.provenance import commit, machine_name

Row = Mapping[str, Any]

COPIED_BYTES = 2**30
"""Bytes copied to measure the memory bandwidth."""


@dataclass
class Section:
    """One section of the report.

    Args:
        title: heading of the section.
        about: description of the measurement.
        rows: one figure each, column → value.
        failed: measurements that failed, with the reason.
        not_reached: measurements for which too little time was left.
        seconds: duration of the section.
    """

    title: str
    about: str
    rows: list[Row] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Bench:
    """State that all sections share: the device, the time limit and the report.

    Args:
        folder: folder for `gpu.json` and `gpu.md`.
        minutes: time after which no measurement starts. None sets no limit.
        device: device that runs the models.
        smoke: True for toy sizes, to test the benchmark itself.
    """

    def __init__(self, folder: Path, minutes: float | None, device: torch.device, smoke: bool) -> None:
        self.folder = folder
        self.device = device
        self.smoke = smoke
        self.sections: dict[str, Section] = {}
        self._end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
        folder.mkdir(parents=True, exist_ok=True)
        self.rate = gemm_rate(torch.bfloat16, device)
        self.header = self._describe()
        print("\n".join(f"{name}: {_shown(value)}" for name, value in self.header.items()), flush=True)

    @property
    def left(self) -> float:
        """Seconds left until the time limit."""
        return self._end - time.monotonic()

    def begin(self, key: str, title: str, about: str) -> None:
        """Start a section. Later measurements belong to it."""
        self.sections[key] = Section(title, " ".join(about.split()))
        print(f"\n{title}", flush=True)
        self._write()

    def measure(self, what: str, estimate: float, work: Callable[[], Row | Sequence[Row] | None]) -> bool:
        """Run one measurement, and record its rows or the reason of its failure.

        Args:
            what: name of the measurement in the report.
            estimate: seconds that it needs. It does not start if less time is left.
            work: function that measures and returns one or more rows, or None.

        Returns:
            True if the measurement succeeded.
        """
        section = list(self.sections.values())[-1]
        begin = time.monotonic()
        made = False
        if self.left < estimate:
            section.not_reached.append(what)
            print(f"  {what}: not reached, {self.left:.0f} s left", flush=True)
        else:
            try:
                measured = work()
                for row in [measured] if isinstance(measured, Mapping) else measured or []:
                    self._add(section, row)
                made = True
            except Exception as error:
                # A failed measurement must not prevent the others.
                section.failed.append({"what": what, "reason": in_one_line(error)[:500]})
                print(f"  {what}: failed: {section.failed[-1]['reason']}", flush=True)
        self.free()
        section.seconds += time.monotonic() - begin
        self._write()
        return made

    def fail(self, what: str, reason: str) -> None:
        """Record a failure without an exception."""
        list(self.sections.values())[-1].failed.append({"what": what, "reason": reason[:500]})
        self._write()

    def free(self) -> None:
        """Free memory that is no longer referenced."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of one call, until the device has finished its work."""
        synchronize(self.device)
        begin = time.perf_counter()
        work()
        synchronize(self.device)
        return time.perf_counter() - begin

    def forget_peak(self) -> None:
        """Reset the device's peak memory to its current memory."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float | None:
        """Peak memory of tensors on the device since `forget_peak`, in GB. None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else None

    def _add(self, section: Section, row: Row) -> None:
        section.rows.append(row)
        print("  " + ", ".join(f"{name} {_shown(value)}" for name, value in row.items()), flush=True)
        self._write()

    def _describe(self) -> dict[str, Any]:
        X = torch.empty(2**20 if self.smoke else COPIED_BYTES, dtype=torch.uint8, device=self.device)
        Y = torch.empty_like(X)
        copy = min(self.seconds(lambda: Y.copy_(X)) for _ in range(5))
        total = torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else None
        return {
            "machine": machine_name(),
            "threads": torch.get_num_threads(),
            "date": date.today().isoformat(),
            "versions": _versions(),
            "bf16 peak, TFLOP/s (a large square product)": self.rate / 1e12,
            "memory, GB": None if total is None else total / 1e9,
            "memory bandwidth, GB/s (reading and writing)": 2 * X.nbytes / copy / 1e9,
            "sizes": "toy sizes, to test the benchmark itself" if self.smoke else "full",
        }

    def _write(self) -> None:
        sections = {key: asdict(section) for key, section in self.sections.items()}
        write_file(self.folder / "gpu.json", json.dumps({"header": self.header, "sections": sections}, indent=2) + "\n")
        parts = ["# fedelta on a GPU", "\n".join(f"- {k}: {_shown(v)}" for k, v in self.header.items())]
        parts += [_markdown(section) for section in self.sections.values()]
        write_file(self.folder / "gpu.md", "\n\n".join(parts) + "\n")


def _markdown(section: Section) -> str:
    parts = [f"## {section.title}", section.about]
    head = list(dict.fromkeys(name for row in section.rows for name in row))
    if head:
        parts.append(table(head, [[_shown(row.get(name)) for name in head] for row in section.rows]))
    lines = [f"- failed: {failure['what']}: {failure['reason']}" for failure in section.failed]
    lines += [f"- not reached: {what}" for what in section.not_reached]
    if lines:
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, f"({section.seconds:.0f} s)"])


def _shown(value: Any) -> str:
    """Format a value for the report: three digits for floats, an empty string for None."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _versions() -> dict[str, str]:
    versions = {"CUDA": str(torch.version.cuda)}
    for name in ("torch", "transformers", "peft", "accelerate"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    # A copy of the working tree has no git history, so the environment may name its commit.
    return versions | {"fedelta commit": commit() or os.environ.get("FEDELTA_COMMIT", "unknown")}
