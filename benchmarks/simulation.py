"""Benchmark of a round of local training and of an evaluation, compared with common code and this machine's limits.

python benchmarks/simulation.py                     everything
python benchmarks/simulation.py --quick             one model, one batch size
python benchmarks/simulation.py --steps 2           two steps per client instead of ten; the ratios hardly change
python benchmarks/simulation.py --write             write the tables to benchmarks/README.md
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from machine import Machine, keep, seconds, table
from tokenizers import Tokenizer, models

from fedelta.federation.engines.measure import total_gemm_rate
from fedelta.federation.engines.workers import Result, Workers
from fedelta.learning.data import Examples
from fedelta.learning.model.class_token import read_class_token_alone
from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.learning.tasks import Classification, Unit, evaluate
from fedelta.learning.training import TrainingSettings, train
from fedelta.learning.training.flops import count_texts, text_cost
from fedelta.learning.training.stacked import StackedClient, train_stacked
from fedelta.lora.adapter import Adapter, initial_adapter

CLASSES = 4
AG_NEWS = [7, 24, 28, 30, 32, 33, 35, 36, 37, 39, 40, 41, 43, 44, 46, 47, 49, 51, 55, 61, 128]
"""Every fifth percentile of the number of word pieces in AG News texts, truncated at 128."""


def bert(layers: int, hidden: int, wide: int) -> Any:
    return transformers.BertConfig(
        vocab_size=30522,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=wide,
        num_labels=CLASSES,
    )


MODELS = {
    "MiniLM-L6": bert(6, 384, 1536),
    "DistilBERT": bert(6, 768, 3072),
    "small Llama": transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_labels=CLASSES,
        pad_token_id=0,
    ),
}


def lora_model(config: Any, class_token_alone: bool) -> LoraModel:
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_config(config)
    if class_token_alone:
        read_class_token_alone(base)
    return LoraModel(base, LoraSettings())


def padder() -> Any:
    """Make a tokenizer that serves only for padding."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1}, unk_token="a")), pad_token="[PAD]"
    )


def texts(count: int, seed: int) -> Examples:
    """Draw random tokens with the lengths of AG News texts."""
    rng = np.random.default_rng(seed)
    lengths = np.interp(rng.random(count), np.linspace(0, 1, len(AG_NEWS)), AG_NEWS).astype(int)
    rows = [rng.integers(1, 8000, length).tolist() for length in lengths]
    return Examples([{"input_ids": row} for row in rows], rng.integers(0, CLASSES, count).tolist())


class Round:
    """A round of K clients with some AdamW steps each, which each method trains in a different way.

    Attributes:
        plain: model as Hugging Face defines it, for the common methods.
        model: the same model with a last layer for the class token only, for fedelta.
    """

    def __init__(self, config: Any, clients: int, batch: int, ranks: list[int], steps: int) -> None:
        self.plain = lora_model(config, class_token_alone=False)
        self.model = lora_model(config, class_token_alone=True)
        self.tokenizer = padder()
        self.heads = self.model.head_tensors()
        self.shards = [texts(steps * batch, seed) for seed in range(clients)]
        self.starts = [self._start(ranks[i % len(ranks)]) for i in range(clients)]
        for rank in set(ranks):
            self.model.prepare(rank)
            self.plain.prepare(rank)
        self.settings = TrainingSettings(steps=steps, batch_size=batch)

    def _start(self, rank: int) -> Adapter:
        return initial_adapter(self.model.shapes, rank, 0).with_scale(1.0)

    def client(self, i: int, model: LoraModel, micro: bool) -> Result:
        model.load(self.starts[i], self.heads)
        settings = self.settings.model_copy(update={"micro_batches": micro})
        train(model, self.tokenizer, self.shards[i], settings, seed=i)
        return Result({})

    def ours(self, workers: int = 1) -> None:
        for _ in Workers(workers).map(lambda i: self.client(i, self.model, True), [1.0] * len(self.shards)):
            pass

    def stacked(self) -> None:
        """Train all clients in one pass."""
        train_stacked(
            self.model,
            self.tokenizer,
            [StackedClient(start, self.heads, self.shards[i], i) for i, start in enumerate(self.starts)],
            self.settings,
        )

    def swapped(self) -> None:
        """Method (b): swap adapters in one model, with batches padded to their longest text."""
        for i in range(len(self.shards)):
            self.client(i, self.plain, micro=False)

    def copied(self) -> None:
        """Method (a): copy the model for each client."""
        for i in range(len(self.shards)):
            self.client(i, copy.deepcopy(self.plain), micro=False)

    def trained_by_hugging_face(self) -> None:
        """Method (c): one `Trainer` per client on the shared model."""
        for i, shard in enumerate(self.shards):
            self.plain.load(self.starts[i], self.heads)
            rows = [{**f, "labels": y} for f, y in zip(shard.features, shard.labels, strict=True)]
            with tempfile.TemporaryDirectory() as folder:
                arguments = transformers.TrainingArguments(
                    output_dir=folder,
                    max_steps=self.settings.steps or 0,
                    per_device_train_batch_size=self.settings.batch_size,
                    learning_rate=self.settings.learning_rate,
                    report_to=[],
                    save_strategy="no",
                    logging_strategy="no",
                    use_cpu=self.plain.device.type == "cpu",
                    disable_tqdm=True,
                )
                collator = transformers.DataCollatorWithPadding(self.tokenizer)
                transformers.Trainer(self.plain.peft, arguments, data_collator=collator, train_dataset=rows).train()

    def limit(self, rate: float) -> float:
        """Seconds at this rate without padding, and with a last layer only for the class token."""
        cost = text_cost(self.model, self.tokenizer, training=True)
        return cost.of(count_texts([length for shard in self.shards for length in shard.lengths])) / rate


RANKS = {"8": [8], "4, 8, 16, 32": [4, 8, 16, 32]}


def training(
    names: list[str], Ks: list[int], batches: list[int], all_ranks: list[str], steps: int, rates: dict[int, float]
) -> str:
    rows = []
    for name in names:
        for clients in Ks:
            for batch in batches:
                for label in all_ranks:
                    work = Round(MODELS[name], clients, batch, RANKS[label], steps)
                    ways: list[Callable[[], None]] = [
                        work.swapped,
                        work.copied,
                        work.trained_by_hugging_face,
                        work.ours,
                        partial(work.ours, workers=2),
                        work.stacked,
                    ]
                    padded, copied, trainer, ours, both, stacked = (seconds(way, repeats=2, enough=10) for way in ways)
                    rows.append(
                        [
                            name,
                            str(clients),
                            str(batch),
                            label,
                            f"{padded:.2f}",
                            f"{padded / copied:.2f}×",
                            f"{padded / trainer:.2f}×",
                            f"{padded / ours:.2f}×",
                            f"{work.limit(rates[1]) / ours:.0%}",
                            f"{ours / both:.2f}×",
                            f"{work.limit(rates[2]) / both:.0%}",
                            f"{ours / stacked:.2f}×",
                        ]
                    )
                    print(" | ".join(rows[-1]), flush=True)
    head = ["model", "K", "batch", "ranks", "(b) swapped, padded, s", "(a) deepcopy", "(c) Trainer", "fedelta"]
    return table([*head, "of the FLOP limit", "two workers", "of the FLOP limit of two", "all clients stacked"], rows)


def evaluation(names: list[str], rates: dict[int, float]) -> str:
    rows = []
    for name in names:
        work = Round(MODELS[name], 1, 2, [8], 1)
        examples = texts(1024, 99)

        def unsorted(work: Round = work, examples: Examples = examples) -> None:
            for begin in range(0, len(examples), 64):
                rows = list(range(begin, min(begin + 64, len(examples))))
                Classification().evaluate_batch(work.plain, work.tokenizer, examples, Unit("forward", rows))

        plain = seconds(unsorted, repeats=2, enough=20)
        ours = seconds(
            partial(evaluate, Classification(), work.model, work.tokenizer, examples, 64), repeats=2, enough=20
        )
        cost = text_cost(work.model, work.tokenizer, training=False)
        limit = cost.of(count_texts(examples.lengths)) / rates[1]
        rows.append([name, f"{plain:.2f}", f"{plain / ours:.2f}×", f"{limit / ours:.0%}"])
        print(" | ".join(rows[-1]), flush=True)
    return table(["model", "as they come, s", "sorted", "of the FLOP limit"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="MiniLM, K = 10, batch 16, mixed ranks")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    names, Ks, batches, ranks = list(MODELS), [10, 20], [2, 8, 32], list(RANKS)
    if arguments.quick:
        names, Ks, batches, ranks = names[:1], [10], [16], ranks[1:]
    machine = Machine.measure()
    rates = {n: total_gemm_rate(Workers(n), torch.float32, torch.device("cpu")) for n in (1, 2)}
    note = (
        f"{machine.describe()} Square: {rates[1] / 1e9:.0f} GFLOP/s in one process, {rates[2] / 1e9:.0f} in 2; "
        f"{arguments.steps} steps a client"
    )
    print(note)
    for part, text in (
        ("training", training(names, Ks, batches, ranks, arguments.steps, rates)),
        ("evaluation", evaluation(names, rates)),
    ):
        print(f"\n{text}\n", flush=True)
        if arguments.write:
            keep(part, f"{note}\n\n{text}")


if __name__ == "__main__":
    main()
