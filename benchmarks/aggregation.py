"""Benchmark of aggregation, compared with published implementations and with the limits of this machine.

python benchmarks/aggregation.py                     all parts; takes half an hour and 4 GB of disk
python benchmarks/aggregation.py --parts accuracy memory
python benchmarks/aggregation.py --quick             fewer layers and clients
python benchmarks/aggregation.py --write             write the tables to benchmarks/README.md
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
    parser.add_argument("--folder", type=Path, help="folder for the adapter folders, which later runs reuse")
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
                text = speed(machine, names, Ks, ranks)
            elif part == "mistral":
                text = mistral(machine, folder / "mistral")
            elif part == "thousand":
                text = thousand(folder / "thousand")
            else:
                text = {"accuracy": accuracy, "memory": memory}[part]()
            print("\n" + text, flush=True)
            if arguments.write:
                keep(part, f"{machine.describe()}\n\n{text}")


if __name__ == "__main__":
    main()
