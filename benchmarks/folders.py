"""Benchmark of `fedelta aggregate` on whole models from disk: a round of Mistral-7B, and a thousand RoBERTa clients."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from machine import Machine, forget, table

from fedelta.sweep.provenance import peak_mb

MISTRAL = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
ROBERTA = {"attention.self.query": (768, 768), "attention.self.value": (768, 768)}
PREFIX = "base_model.model.model.layers"


def write_folder(folder: Path, layers: dict[str, tuple[int, int]], depth: int, rank: int, seed: int) -> None:
    """Write a PEFT adapter folder: factors that all clients share, plus a tenth of their size that differs."""
    folder.mkdir(parents=True)
    own, shared = torch.Generator().manual_seed(seed + 1), torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(depth):
        for name, (m, n) in layers.items():
            for factor, shape in (("A", (rank, n)), ("B", (m, rank))):
                common = torch.randn(shape, generator=shared)
                key = f"{PREFIX}.{layer}.{name}.lora_{factor}.weight"
                tensors[key] = 0.02 * (common + 0.1 * torch.randn(shape, generator=own))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in layers}),
        "base_model_name_or_path": "a model of this shape",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def read_once(folders: list[Path]) -> float:
    """Seconds to read every byte of the files."""
    begin = time.perf_counter()
    for folder in folders:
        with safetensors.safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                tensors.get_tensor(key).sum()
    return time.perf_counter() - begin


def write_once(path: Path, size: int) -> float:
    """Seconds to write `size` bytes to disk."""
    data = os.urandom(2**24)
    begin = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-size // len(data))):
            file.write(data)
        os.fsync(file.fileno())
    elapsed = time.perf_counter() - begin
    path.unlink()
    return elapsed


def command(folders: list[Path], output: Path, method: str | None) -> tuple[float, float]:
    """Run `fedelta aggregate`, and return its wall seconds, including the start of Python, and its peak MB."""
    arguments = ["aggregate", *map(str, folders), "-o", str(output), "--json"]
    arguments += ["--method", method] if method else []
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    elapsed = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(done.stderr)
    return elapsed, float(done.stderr.splitlines()[-1])


def drop(folders: list[Path], cold: bool) -> None:
    for folder in folders if cold else []:
        forget(folder / "adapter_model.safetensors")


def start_of_python() -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import fedelta.aggregate.step, fedelta.cli.app"], check=True)
    return time.perf_counter() - begin


def mistral(machine: Machine, folder: Path, clients: int = 10, rank: int = 16) -> str:
    folders = [folder / f"site-{i:02d}" for i in range(clients)]
    for i, site in enumerate(folders):
        if not site.exists():
            write_folder(site, MISTRAL, 32, rank, i)
    q, sides = clients * rank, 32 * sum(m + n for m, n in MISTRAL.values())
    gram = 2 * q * q * sides
    # The deviation in the printed table needs the Gram matrices of both stacks. An SVD needs them again, in fp64.
    limits = {"replication": gram / machine.fp32, "fedex": gram / machine.fp32}
    limits["florist"] = limits["exact mean"] = gram / machine.fp32 + gram / machine.fp64
    limits["exact mean"] += 2 * q * q * sides / machine.fp64
    start = min(start_of_python() for _ in range(2))
    rows = []
    for name, limit in limits.items():
        for cold in (True, False):
            read, write, wall = (float("inf"),) * 3
            for _ in range(2):
                drop(folders, cold)
                read = min(read, read_once(folders))
                drop(folders, cold)
                output = folder / "out"
                elapsed, peak = command(folders, output, None if name == "exact mean" else name)
                wall = min(wall, elapsed)
                size = sum(file.stat().st_size for file in output.iterdir())
                subprocess.run(["rm", "-rf", str(output)], check=True)
                write = min(write, write_once(folder / "scratch", size))
            rows.append(
                [
                    name,
                    "disk" if cold else "page cache",
                    f"{read:.2f}",
                    f"{limit:.2f}",
                    f"{wall - start:.2f}",
                    f"{(wall - start) / (read + limit):.1f}×",
                    f"{size / 1e9:.2f} GB in {write:.2f}",
                    f"{peak:.0f}",
                ]
            )
            print(" | ".join(rows[-1]), flush=True)
    head = ["method", "files from", "read once, s", "GEMM limit, s", "fedelta aggregate, s", "of read + limit"]
    return f"Best of two. Start of Python and imports, {start:.1f} s, taken off.\n\n" + table(
        [*head, "writing as many bytes, s", "peak MB"], rows
    )


def thousand(folder: Path) -> str:
    """Measure peak memory with 10 and with 1,000 clients of RoBERTa-base's shape and ranks 4, 8 and 32, from disk."""
    folders = [folder / f"client-{i:04d}" for i in range(1000)]
    for i, site in enumerate(folders):
        if not site.exists():
            write_folder(site, ROBERTA, 12, (4, 8, 32)[i % 3], i)
    rows = []
    for name in ("exact mean", "replication", "fedex", "flexlora", "hetlora", "flora", "raflora"):
        peaks = []
        for count in (10, 1000):
            output = folder / "out"
            wall, peak = command(folders[:count], output, None if name == "exact mean" else name)
            peaks.append((wall, peak))
            subprocess.run(["rm", "-rf", str(output)], check=True)
        (short, few), (long, many) = peaks
        rows.append(
            [name, f"{few:.0f}", f"{many:.0f}", f"{100 * (many / few - 1):+.0f} %", f"{short:.1f}", f"{long:.1f}"]
        )
        print(" | ".join(rows[-1]), flush=True)
    return table(["method", "10 clients, MB", "1,000 clients, MB", "more", "10 clients, s", "1,000 clients, s"], rows)


if __name__ == "__main__":
    from fedelta.cli.app import main

    try:
        main()
    finally:
        print(peak_mb(), file=sys.stderr)
