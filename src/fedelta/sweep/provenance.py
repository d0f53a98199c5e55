"""Provenance of a result: machine, versions, commit, and peak memory."""

import functools
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from fedelta import __version__

PACKAGES = ("torch", "transformers", "peft", "datasets", "numpy")


def machine_name() -> str:
    """Name of the processor, number of cores, and the accelerator if there is one."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    name = f"{name}, {os.cpu_count()} cores"
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


def versions() -> dict[str, str]:
    """Versions of Python, of the main packages, and of fedelta with its commit, if it is a checkout."""
    packages = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | packages | {"fedelta": __version__, "commit": commit()}


@functools.cache
def commit() -> str:
    """Commit of the checkout that this package was loaded from, marked if its code has changes; empty elsewhere."""
    try:
        # An installed package may lie in another repository; its commit is not fedelta's.
        _git("ls-files", "--error-unmatch", __file__)
        changed = _git("status", "--porcelain", "--untracked-files=no", ".")
        return _git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def peak_mb() -> float:
    """Peak memory of this process in MB; 0 where the system does not report it.

    `ru_maxrss` is not used because it includes the memory that the parent process had before the fork.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)
