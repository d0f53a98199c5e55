"""Benchmark of a federated round of a model with seven billion parameters, and of folding its exact residual."""

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from gpu_models import lora_model, texts, tokenizer, words_of
from gpu_report import Bench, Row
from layers import clients, our_fold, published_fold

from fedelta.federation.client import Trainer
from fedelta.federation.engines import Observer
from fedelta.federation.engines.activation_caches import ActivationCaches
from fedelta.federation.engines.evaluation import Evaluator
from fedelta.federation.engines.local import LocalEngine
from fedelta.federation.engines.rounds import EngineContext
from fedelta.federation.engines.workers import Workers
from fedelta.federation.run_folder import RunFolder
from fedelta.learning.data.partition import client_names
from fedelta.learning.shards import Shard
from fedelta.lora.adapter import LoraPair
from fedelta.runs.assemble import make_server
from fedelta.runs.config import Config, parse_config

CLIENTS, RANK = 3, 16

LAYERS = {
    "q_proj, o_proj": ((4096, 4096), 64),
    "k_proj, v_proj": ((1024, 4096), 64),
    "gate_proj, up_proj": ((14336, 4096), 64),
    "down_proj": ((4096, 14336), 32),
}
"""Mistral-7B's linear layers: name → shape, and number of layers with this shape."""


class _Rounds(Observer):
    """Record the seconds of each round, from its start until it is saved."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0

    def clients_started(self, round: int, clients: int) -> None:  # noqa: ARG002
        self._begin = time.perf_counter()

    def round_done(self, record: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.seconds.append(time.perf_counter() - self._begin)


def _config(bench: Bench) -> Config:
    size = {"steps": 2, "batch_size": 2} if bench.smoke else {"steps": 6, "batch_size": 8}
    return parse_config(
        {
            "workers": 1,
            "threads": torch.get_num_threads(),
            "method": "fedex",
            "task": "completion",
            "model": {"dtype": "bfloat16", "gradient_checkpointing": True},
            "lora": {"alpha": 16, "target_modules": "all-linear"},
            "ranks": {"allocation": "uniform", "high": 2 if bench.smoke else RANK},
            "training": size | {"learning_rate": 1e-4},
            "evaluation": {"batch_size": 8},
        }
    )


def run_rounds(bench: Bench, config: Config, rounds: int, folder: Path) -> tuple[list[float], list[dict[str, Any]]]:
    """Run rounds as `fedelta run` does, and return the seconds of each with saving, and the lines of timings.jsonl."""
    model = lora_model("Mistral-7B", config.lora, bench.device, checkpointing=True, toy=bench.smoke)
    length, size = 8 if bench.smoke else 512, config.training.batch_size
    words = words_of(model)
    rows = [texts([length] * size * (config.training.steps or 1), words, True, seed) for seed in range(CLIENTS)]
    shards = dict(zip(client_names(CLIENTS), (Shard(each, each.select([])) for each in rows), strict=True))
    validation = texts([length] * 16, words, causal=True, seed=CLIENTS)
    trainer = Trainer(model, tokenizer(), config.task, config.training, config.evaluation.batch_size, config.seed)
    trainer.timed = True
    server = make_server(config)
    counts = {client: len(shard.train) for client, shard in shards.items()}
    state = server.start(model.shapes, model.head_tensors(), counts, [])
    run_folder = RunFolder(folder, config.dump())
    run_folder.begin(state)
    pool = Workers(1, config.threads)
    watcher = _Rounds()
    caches = ActivationCaches(trainer.activation_cache, pool, validation, {}, 0)
    evaluator = Evaluator(server, trainer, pool, watcher, caches)
    context = EngineContext(server, trainer, evaluator, validation, run_folder, watcher)
    engine = LocalEngine(context, shards, 1)
    bench.forget_peak()
    engine.run(state, rounds, 1)
    return watcher.seconds, [json.loads(line) for line in run_folder.timings_file.read_text().splitlines()]


TRAINING = ("batches", "forward", "backward", "optimizer")


def phases(number: int, whole: float, timing: Mapping[str, Any], peak: float | None) -> list[Row]:
    """Rows of the table for one round."""
    inside, outside = timing["in_workers"], timing["seconds"]
    alone = sum(inside.get(phase, 0.0) for phase in TRAINING)
    seconds_of = {
        **{f"client: {phase}": seconds for phase, seconds in inside.items()},
        "client: between": outside.get("clients", 0.0) - sum(inside.values()),
        **{f"server: {phase}": seconds for phase, seconds in outside.items() if phase != "clients"},
        "saving the round": whole - sum(outside.values()),
    }
    rows: list[Row] = [
        {"round": number, "phase": phase, "seconds": seconds, "of the round": f"{seconds / whole:.1%}"}
        for phase, seconds in seconds_of.items()
    ]
    summary = {"round": number, "phase": "all", "seconds": whole, "of the round": "100.0%"}
    return [*rows, summary | {"over training alone": f"+{whole / alone - 1:.1%}", "peak memory, GB": peak}]


def federated_round(bench: Bench) -> None:
    bench.begin(
        "round",
        "A federated round of Mistral-7B's shape",
        f"""fedex with {CLIENTS} clients of rank {RANK} on all linear layers, six steps of eight texts of 512 tokens
        each, and an evaluation on 16 texts, with the real server, engine and run folder. Each phase ends when the GPU
        has finished its work. In the second round the base has the patch of the first. "Over training alone" compares
        the round with its batches, forward and backward passes and optimizer steps.""",
    )

    def rows() -> list[Row]:
        with tempfile.TemporaryDirectory() as folder:
            seconds, timings = run_rounds(bench, _config(bench), 2, Path(folder))
        peak = bench.peak()
        rounds = zip(seconds, timings, strict=True)
        return [row for i, (whole, timing) in enumerate(rounds) for row in phases(i + 1, whole, timing, peak)]

    bench.measure("two rounds", 60.0, rows)


def fold(bench: Bench) -> None:
    bench.begin(
        "fold",
        "Folding the exact residual of a 7B",
        f"""{CLIENTS} clients of rank {RANK} and all linear layers of Mistral-7B, measured on one layer of each shape
        and multiplied by the number of such layers. fedelta: a step of fedex, whose patch is added to the fp32 weight
        as one product. Published: sum of dense products, mean, and difference, which is added to the weight.
        Difference: between the residuals of the two devices, relative to the residual.""",
    )
    totals: dict[str, float] = {}
    missing: list[str] = []
    for layer, (shape, number) in LAYERS.items():
        m, n = (side // 64 for side in shape) if bench.smoke else shape

        def measure(layer: str = layer, m: int = m, n: int = n, number: int = number) -> Row:
            row, milliseconds = layer_row(bench, m, n)
            for name, value in milliseconds.items():
                totals[name] = totals.get(name, 0.0) + number * value / 1e3
            return {"layer": f"{layer} {m}×{n}", "layers": number} | milliseconds | row

        if not bench.measure(layer, 12.0, measure):
            missing.append(layer)
    if totals and not missing:
        # The columns are in milliseconds, so their sums are too.
        sums = {name: 1e3 * seconds for name, seconds in totals.items()}
        number = sum(number for _, number in LAYERS.values())
        bench.measure("all layers", 0.0, lambda: {"layer": "all layers together", "layers": number} | sums)


def layer_row(bench: Bench, m: int, n: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Measure one layer on both devices, and return their difference and the milliseconds of each method."""
    pairs = clients(m, n, CLIENTS, RANK)
    weight = torch.zeros(m, n)
    device_pairs = [LoraPair(pair.A.to(bench.device), pair.B.to(bench.device), pair.scale) for pair in pairs]
    # The server allocates its sums on torch's default device.
    with torch.device(bench.device):
        device_weight = torch.zeros(m, n)
        device_fold = our_fold(device_pairs, device_weight)

    def on_the_device() -> None:
        with torch.device(bench.device):
            device_fold()

    ways: dict[str, Callable[[], object]] = {
        "fedelta, CPU, ms": our_fold(pairs, weight),
        "published, CPU, ms": lambda: published_fold(pairs, weight),
        "fedelta, device, ms": on_the_device,
        "published, device, ms": lambda: published_fold(device_pairs, device_weight),
    }
    ways["fedelta, CPU, ms"]()
    ways["fedelta, device, ms"]()
    difference = float((device_weight.cpu() - weight).norm() / weight.norm())
    milliseconds = {}
    for name, work in ways.items():
        work()
        milliseconds[name] = 1e3 * min(bench.seconds(work) for _ in range(3))
    return {"difference": f"{difference:.1e}"}, milliseconds
