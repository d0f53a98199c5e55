"""Aggregation against the published ways and against what this machine can do.

python benchmarks/aggregation.py                     everything; about half an hour, 4 GB of disk
python benchmarks/aggregation.py --parts accuracy memory
python benchmarks/aggregation.py --quick             fewer layers and clients
python benchmarks/aggregation.py --write             keep the tables in benchmarks/README.md
"""

import argparse
import tempfile
from pathlib import Path

import torch
from folders import mistral, thousand
from layers import LAYERS, accuracy, memory, speed
from machine import Machine, keep

PARTS = ("layers", "accuracy", "memory", "mistral", "thousand")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="two layers, r = 16, K = 3 and 10")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--folder", type=Path, help="where adapter folders are made, and left for the next time")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        for part in arguments.parts:
            machine = Machine.measure()
            print(f"\n## {part}\n\n{machine.describe()}", flush=True)
            if part == "layers":
                names = ["RoBERTa-base query", "Mistral-7B q_proj"] if arguments.quick else list(LAYERS)
                Ks, ranks = ([3, 10], [16]) if arguments.quick else ([3, 10, 50, 100], arguments.ranks)
                found = speed(machine, names, Ks, ranks)
            elif part == "mistral":
                found = mistral(machine, folder / "mistral")
            elif part == "thousand":
                found = thousand(folder / "thousand")
            else:
                found = {"accuracy": accuracy, "memory": memory}[part]()
            print("\n" + found, flush=True)
            if arguments.write:
                keep(part, f"{machine.describe()}\n\n{found}")


if __name__ == "__main__":
    main()
