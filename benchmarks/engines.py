"""Benchmark of a round with each engine: in process, over Flower nodes on loopback, and by Flower's simulation on Ray.

The cost of an engine is the time of its round minus that of one process with one worker, which is the training itself:
the other engines also train in one process, with the model already loaded. Round 0, in which they load and connect, is
not counted.

python benchmarks/engines.py                 the built-in example's data and model, three clients
python benchmarks/engines.py --write         write the table to benchmarks/README.md
"""

import argparse
import json
import tempfile
from statistics import mean
from typing import Any

from machine import Machine, keep, table

from fedelta.federation.engines.observer import Observer
from fedelta.flower.loopback import run_on_loopback
from fedelta.runs.config import load_config
from fedelta.runs.runner import Run, run

CLIENTS = 3
SETTINGS = [
    "method=fedex",
    f"partition.clients={CLIENTS}",
    "training.steps=10",
    "evaluation.every=1000",
    "workers=1",
    "data.evaluation_limit=200",
]
ENGINES = {
    "in process": lambda config: run(config),
    "Flower, a node a client": lambda config: run_on_loopback(config, resume=False, observer=Observer()),
    "Flower, simulated on Ray": lambda config: run_on_loopback(config, resume=False, observer=Observer(), ray=True),
}


def seconds(finished: Run) -> list[float]:
    """Seconds of each round after the first, without evaluation."""
    lines = [json.loads(line) for line in finished.folder.timings_file.read_text().splitlines()]
    return [sum(v for phase, v in line["seconds"].items() if phase != "evaluation") for line in lines[1:]]


def megabytes(finished: Run) -> float:
    """Mean megabytes sent in a round, in both directions, as serialized."""
    return mean(record["bytes_down"]["total"] + record["bytes_up"]["total"] for record in finished.records[1:]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    rows: list[list[Any]] = []
    training: list[float] = []
    for name, engine in ENGINES.items():
        for precision in ("float32", "int8"):
            with tempfile.TemporaryDirectory() as folder:
                options = [f"output={folder}", f"rounds={arguments.rounds}", f"federation.precision={precision}"]
                finished = engine(load_config(None, [*SETTINGS, *options]))
                round_seconds, sent = seconds(finished), megabytes(finished)
            training = training or round_seconds
            extra = [a - mean(training) for a in round_seconds]
            rows.append(
                [
                    name,
                    precision,
                    f"{mean(round_seconds):.2f}",
                    f"{mean(round_seconds) / mean(training):.2f}×",
                    f"{mean(extra):+.2f}",
                    f"{max(extra):+.2f}",
                    f"{sent:.2f}",
                ]
            )
            print(rows[-1], flush=True)
    head = ["engine", "messages in", "round, s", "of in process", "above the training, s", "at most", "MB a round"]
    text = table(head, rows)
    print(text)
    if arguments.write:
        keep("engines", f"{Machine.measure().describe()}\n\n{text}")


if __name__ == "__main__":
    main()
