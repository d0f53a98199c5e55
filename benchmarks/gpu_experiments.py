"""Benchmark of one round of each experiment at full size, and a projection of its total hours."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_models import CAUSAL, around, lora_model, random_adapter, texts, tokenizer, words_of
from gpu_report import Bench, Row

from fedelta.learning.model.lora_model import LoraModel
from fedelta.learning.tasks import Classification, evaluate
from fedelta.learning.training import train
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.contribution import Contribution
from fedelta.methods import make_method
from fedelta.methods.method import MethodState
from fedelta.runs.config import Config
from fedelta.sweep.cells import Expansion
from fedelta.sweep.grid import load_grid

EXPERIMENTS = Path(__file__).parents[1] / "experiments"

SHAPE_OF = {
    "distilbert/distilbert-base-uncased": "DistilBERT",
    "albert/albert-base-v2": "ALBERT-base",
    "FacebookAI/roberta-base": "RoBERTa-base",
    "FacebookAI/roberta-large": "RoBERTa-large",
    "openai-community/gpt2": "GPT-2",
    "meta-llama/Llama-3.2-3B": "Llama-3.2-3B",
    "mistralai/Mistral-7B-v0.1": "Mistral-7B",
    "google/gemma-2-9b": "Gemma-2-9B",
}
"""Name of a model on the hub → its shape, in the order of measurement, small models first."""


@dataclass(frozen=True)
class Size:
    """Size of a public data set: its training rows, and the number of tokens in a typical text."""

    rows: int
    tokens: int


SIZES = {
    ("fancyzhx/ag_news", None): Size(120_000, 40),
    ("fancyzhx/dbpedia_14", None): Size(560_000, 65),
    ("nyu-mll/glue", "cola"): Size(8_551, 11),
    ("nyu-mll/glue", "rte"): Size(2_490, 70),
    ("nyu-mll/glue", "mrpc"): Size(3_668, 53),
    ("nyu-mll/glue", "sst2"): Size(67_349, 13),
    ("nyu-mll/glue", "qnli"): Size(104_743, 50),
    ("nyu-mll/glue", "stsb"): Size(5_749, 31),
    ("e2e", None): Size(42_061, 75),
    ("metamath", None): Size(395_000, 270),
    ("commonsense_170k", None): Size(170_420, 110),
}

# The cost of a step depends only on these. The rank and the number of classes hardly matter.
Group = tuple[str, str, str | None, int, int | None]


def group_of(config: Config) -> Group:
    """Group of a run: model, data set and its configuration, texts per step and per pass."""
    training = config.training
    data = config.data
    return config.model.name, data.source, data.configuration, training.batch_size, training.micro_batch_size


def cells(grid: Path) -> list[Config]:
    """All runs of a grid at full size, including trials."""
    expansion = Expansion(load_grid(grid, "full"))
    return [config for plan in (expansion.trials()[0], expansion.cells(None)) for config in plan.cells.values()]


@dataclass(frozen=True)
class Cost:
    """Seconds of a local step, of an aggregation, and of the evaluation of one text."""

    step: float
    aggregation: float
    text: float


def held_out(config: Config) -> int:
    """Number of validation rows. Each of these data sets has a test split, but no validation split."""
    size = SIZES[config.data.source, config.data.configuration]
    return round(config.data.validation * size.rows)


def steps(config: Config) -> int:
    """Number of local steps of a client in a round."""
    if config.training.steps is not None:
        return config.training.steps
    rows = SIZES[config.data.source, config.data.configuration].rows - held_out(config)
    own = rows * (1 - config.data.client_validation) / config.partition.clients
    return config.training.epochs * max(1, round(own / config.training.batch_size))


def seconds_of_round(config: Config, cost: Cost) -> float:
    """Seconds of one round of a run, including its share of the evaluations."""
    clients = config.federation.round_size(config.partition.clients)
    evaluation = cost.text * held_out(config) / min(config.evaluation.every, config.rounds)
    return clients * steps(config) * cost.step + cost.aggregation + evaluation


def aggregation(model: LoraModel, rank: int, clients: int) -> Callable[[], None]:
    """Make a function that runs one step of fedex on the updates of `clients`."""
    zero = Adapter(
        {name: LoraPair(torch.zeros(rank, n), torch.zeros(m, rank)) for name, (m, n) in model.shapes.items()}
    )
    # Clients alternate between two adapters, because the cost of an update does not depend on its values.
    adapters = [random_adapter(model, rank, seed) for seed in range(2)]
    method = make_method("fedex")

    def step() -> None:
        method.step(MethodState(0, zero), (Contribution(str(i), 1.0, adapters[i % 2]) for i in range(clients)))

    return step


class Models:
    """Holder of one model at a time, so that consecutive groups of runs can share it."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._key: Any = None
        self._model: LoraModel | None = None

    def get(self, config: Config) -> LoraModel:
        key = config.model.name, config.lora.target_modules, config.model.dtype, config.model.gradient_checkpointing
        if key != self._key or self._model is None:
            self._model = None
            self.bench.free()
            self._model = lora_model(
                SHAPE_OF[config.model.name],
                config.lora,
                self.bench.device,
                getattr(torch, config.model.dtype),
                config.model.gradient_checkpointing,
                self.bench.smoke,
            )
            self._key = key
        return self._model


def measure(bench: Bench, models: Models, configs: Sequence[Config]) -> Cost:
    """Measure a few steps, one aggregation and an evaluation of a group of runs."""
    config = configs[0]
    model = models.get(config)
    size = SIZES[config.data.source, config.data.configuration]
    batch, micro = config.training.batch_size, config.training.micro_batch_size
    longest, mean, number = config.data.max_length, size.tokens, 4
    if bench.smoke:
        batch, micro, longest, mean, number = 2, 1 if micro else None, 8, 4, 1
    causal = SHAPE_OF[config.model.name] in CAUSAL
    examples = texts(around(mean, longest, batch * number), words_of(model), causal)
    rank = max(each.ranks.largest for each in configs)
    clients = max(each.federation.round_size(each.partition.clients) for each in configs)
    model.load(random_adapter(model, rank, 0), model.head_tensors())
    settings = config.training.model_copy(update={"batch_size": batch, "micro_batch_size": micro, "stack": 1})

    def train_for(number: int) -> None:
        train(model, tokenizer(), examples, settings.model_copy(update={"steps": number}), seed=0)

    train_for(1)
    step = bench.seconds(lambda: train_for(number)) / number
    task = config.task if causal else Classification()
    evaluation_batch = 8 if bench.smoke else config.evaluation.batch_size

    def evaluate_rows() -> None:
        evaluate(task, model, tokenizer(), rows, evaluation_batch)

    rows = texts(around(mean, longest, 2 * evaluation_batch, seed=1), words_of(model), causal, seed=1)
    evaluate_rows()
    text = bench.seconds(evaluate_rows) / len(rows)
    return Cost(step, bench.seconds(aggregation(model, rank, clients)), text)


def row_of(grid: str, group: Group, configs: Sequence[Config], cost: Cost) -> Row:
    """Row of the table for a group of runs."""
    rounds = sum(config.rounds for config in configs)
    seconds = sum(config.rounds * seconds_of_round(config, cost) for config in configs)
    name, source, configuration, batch, micro = group
    return {
        "grid": grid,
        "model": SHAPE_OF[name],
        "data": configuration or source.split("/")[-1],
        "batch": f"{batch}" if micro is None else f"{batch} in passes of {micro}",
        "runs": len(configs),
        "rounds": rounds,
        "step, s": cost.step,
        "aggregation, s": cost.aggregation,
        "evaluation, ms a text": 1e3 * cost.text,
        "round, s": seconds / rounds,
        "hours": seconds / 3600,
    }


def experiments(bench: Bench) -> None:
    bench.begin(
        "experiments",
        "The experiments at full size, projected",
        """A few local steps, an aggregation by fedex and an evaluation were measured with random weights and texts of
        typical lengths (an assumption, see `SIZES`). They were scaled by the known sizes of the data sets and by the
        runs of each grid, including trials of tuning. Not included: generation of answers, the evaluation harness, the
        test split, the ranking of clients by loss, messages, saving, and loading of models and data.""",
    )
    groups: dict[tuple[str, Group], list[Config]] = defaultdict(list)

    def read() -> None:
        for file in sorted(EXPERIMENTS.glob("*/*.yaml")):
            for config in cells(file):
                groups[f"{file.parent.name}/{file.stem}", group_of(config)].append(config)

    if not bench.measure("reading the grids", 10.0, read):
        return
    order = list(SHAPE_OF)
    models, missing = Models(bench), []
    hours: dict[str, float] = defaultdict(float)
    for (grid, group), configs in sorted(groups.items(), key=lambda item: (order.index(item[0][1][0]), str(item[0]))):
        what = f"{grid}: {SHAPE_OF[group[0]]}, {group[2] or group[1]}, batch {group[3]}"

        def row(grid: str = grid, group: Group = group, configs: list[Config] = configs) -> Row:
            made = row_of(grid, group, configs, measure(bench, models, configs))
            hours[grid] += made["hours"]
            return made

        if not bench.measure(what, 20.0 if SHAPE_OF[group[0]] in CAUSAL else 6.0, row):
            missing.append(what)
    note = f"without {len(missing)} groups that were not measured" if missing else "all groups"
    if hours:
        total = sum(hours.values())
        bench.measure("hours by grid", 0.0, lambda: [{"grid": grid, "hours": value} for grid, value in hours.items()])
        bench.measure("hours in total", 0.0, lambda: {"grid": "all grids", "data": note, "hours": total})
