"""A round of the same work by each engine: in process, over Flower's nodes on loopback, by Flower's simulation on Ray.

What an engine costs is its round less the round of one process with one worker, which is the training itself: the warm
trainer of the others is one process too. Round 0 is left out: there they load and connect.

python benchmarks/engines.py                 the built-in example's data and model, three clients
python benchmarks/engines.py --write         keep the table in benchmarks/README.md
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
    """Of each round after the first, without evaluation."""
    lines = [json.loads(line) for line in finished.folder.timings_file.read_text().splitlines()]
    return [sum(v for phase, v in line["seconds"].items() if phase != "evaluation") for line in lines[1:]]


def megabytes(finished: Run) -> float:
    """Sent in a round, both ways, as serialized."""
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
                found, sent = seconds(finished), megabytes(finished)
            training = training or found
            extra = [a - mean(training) for a in found]
            rows.append(
                [
                    name,
                    precision,
                    f"{mean(found):.2f}",
                    f"{mean(found) / mean(training):.2f}×",
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
