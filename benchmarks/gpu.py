"""Benchmark of fedelta on a GPU. It takes some minutes, needs no network, and measures the most useful figures first.

python benchmarks/gpu.py --minutes 7 --out DIR      writes figures to DIR/gpu.json and DIR/gpu.md as they are measured
python benchmarks/gpu.py --smoke --out DIR          runs everything on a CPU with toy sizes, to test the benchmark
python benchmarks/gpu.py --only training,round ...  runs only these sections
"""

import argparse
import gc
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from gpu_experiments import experiments
from gpu_report import Bench, Row
from gpu_round import federated_round, fold
from gpu_training import stacks, training

ROOT = Path(__file__).parents[1]

TEST_SECONDS = 90.0
"""Time limit of the tests, which must leave time for the figures."""


def tests(bench: Bench) -> None:
    bench.begin("tests", "Tests on the device", "`pytest -m gpu tests/gpu` in a separate process.")

    def row() -> Row:
        limit = min(TEST_SECONDS, max(10.0, bench.left / 4))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-vv",
            "--tb=short",
            "-m",
            "gpu",
            "tests/gpu",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
        if bench.device.type == "cpu":
            environment["FEDELTA_TEST_DEVICE"] = "cpu"
        done = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            output, _ = done.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            done.kill()
            output, _ = done.communicate()
            bench.fail("all of the tests", f"not finished after {limit:.0f} s")
        lines = output.splitlines()
        counts = {
            word.lower(): sum(bool(re.match(rf"tests/gpu/\S+::.* {word}\b", line)) for line in lines)
            for word in ("PASSED", "FAILED", "SKIPPED", "ERROR")
        }
        for line in [line for line in lines if line.startswith(("FAILED tests", "ERROR tests"))][:8]:
            name, _, reason = line.split(" ", 1)[1].partition(" - ")
            bench.fail(name, reason)
        if counts["passed"] == 0 or done.returncode not in (0, 1):
            bench.fail("the tests", f"pytest ended with {done.returncode}: {' '.join(lines[-3:])}")
        return counts

    bench.measure("the tests", 20.0, row)


SECTIONS: tuple[Callable[[Bench], None], ...] = (tests, training, stacks, federated_round, fold, experiments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.0, help="time after which no measurement starts")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--only", default="", help=f"sections to run, out of {', '.join(s.__name__ for s in SECTIONS)}")
    parser.add_argument("--smoke", action="store_true", help="toy sizes on the CPU")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device; --smoke tries the benchmark on a CPU")
    wanted = arguments.only.split(",") if arguments.only else [section.__name__ for section in SECTIONS]
    if unknown := set(wanted) - {section.__name__ for section in SECTIONS}:
        parser.error(f"--only: no section {sorted(unknown)[0]}")
    torch.set_num_threads(1 if arguments.smoke else len(os.sched_getaffinity(0)))
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    # Imported modules are never freed. Garbage collection is a hundred times as fast if it does not visit them.
    gc.freeze()
    device = torch.device("cpu" if arguments.smoke else "cuda")
    bench = Bench(arguments.out, None if arguments.smoke else arguments.minutes, device, arguments.smoke)
    for section in SECTIONS:
        if section.__name__ in wanted:
            section(bench)


if __name__ == "__main__":
    main()
