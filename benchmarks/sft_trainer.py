"""Benchmark of one client's training on completions beside TRL's `SFTTrainer`: tokens per second, as ratios.

Both train on the same tokens in the same order, with the same adapter, optimizer and number of threads, in one process.
They take turns, and each ratio is the median over the turns. Tokens are those of the texts, without padding.

python benchmarks/sft_trainer.py                       the built-in chat model, fp32 and bf16, about two minutes
python benchmarks/sft_trainer.py --model FOLDER        another model
python benchmarks/sft_trainer.py --steps 8 --turns 5   more steps in a turn, and more turns
python benchmarks/sft_trainer.py --write               write the table to benchmarks/README.md
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import datasets
import peft
import torch
import transformers
from machine import Machine, keep, table

from fedelta.learning.data import DataSettings, Examples
from fedelta.learning.data.sources import load_splits
from fedelta.learning.model.base_model import ModelSettings, load_base, load_tokenizer, locate_model
from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.learning.tasks import Completion
from fedelta.learning.training import TrainingSettings, train
from fedelta.lora.adapter import initial_adapter
from fedelta.seeds import derive_seed

RANK, RATE, SEED = 8, 1e-3, 0
TASK = Completion(
    prompt="Describe this Python function in one sentence.\n\n{signature}", completion="{summary}", metric="loss"
)
DATA = DataSettings(source="pydoc-functions", max_length=256)


class Turn(NamedTuple):
    """Seconds of some training steps, and their mean loss."""

    seconds: float
    loss: float


class SameTraining:
    """The same training steps in fedelta and in TRL.

    Args:
        name: name or folder of the model.
        dtype: type of its base, `float32` or `bfloat16`.
        batch, steps: texts per step, and steps in a turn.
    """

    def __init__(self, name: str, dtype: str, batch: int, steps: int) -> None:
        self.batch, self.steps, self.dtype = batch, steps, dtype
        settings = ModelSettings(name=name, dtype=dtype, device="cpu")
        self.tokenizer = load_tokenizer(settings)
        self.model = LoraModel(
            load_base(settings, 0, self.tokenizer, SEED, "completion"), LoraSettings(target_modules="all-linear")
        )
        self.start = initial_adapter(self.model.shapes, RANK, SEED).with_scale(1.0)
        rows = load_splits(DATA, TASK.columns(DATA), None)["train"].shuffle(seed=SEED).select(range(batch * steps))
        self.examples: Examples = TASK.examples(rows, DATA, (), self.tokenizer)
        self.tokens = sum(self.examples.lengths)
        # TRL in its usual form: attention and types are what transformers, PEFT and `SFTConfig` choose.
        base = transformers.AutoModelForCausalLM.from_pretrained(locate_model(name), dtype=getattr(torch, dtype))
        lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        self.theirs = peft.get_peft_model(base, lora)

    def fedelta(self, packing: bool) -> Turn:
        settings = TrainingSettings(steps=self.steps, batch_size=self.batch, learning_rate=RATE, packing=packing)
        self.model.load(self.start, {})
        begin = time.perf_counter()
        loss = train(self.model, self.tokenizer, self.examples, settings, SEED)
        return Turn(time.perf_counter() - begin, loss)

    @torch.no_grad()
    def _load_start(self) -> None:
        for module, pair in self.start.items():
            layer = self.theirs.get_submodule(f"base_model.model.{module}")
            layer.lora_A["default"].weight.copy_(pair.A)
            layer.lora_B["default"].weight.copy_(pair.B)

    def trl(self) -> Turn:
        from trl import SFTConfig, SFTTrainer

        self._load_start()
        order = self.examples.training_order(self.batch, derive_seed(SEED, "epoch", 0))
        rows = [{**self.examples.features[row], "labels": self.examples.labels[row]} for part in order for row in part]
        with tempfile.TemporaryDirectory() as folder:
            arguments = SFTConfig(
                output_dir=folder,
                max_steps=self.steps,
                per_device_train_batch_size=self.batch,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                train_sampling_strategy="sequential",
                max_length=None,
                bf16=self.dtype == "bfloat16",
                gradient_checkpointing=False,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            )
            trainer = SFTTrainer(
                self.theirs, arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=self.tokenizer
            )
            trainer.remove_callback(transformers.PrinterCallback)
            begin = time.perf_counter()
            result = trainer.train()
            return Turn(time.perf_counter() - begin, result.training_loss)


def row(name: str, dtype: str, batch: int, steps: int, turns: int) -> list[str]:
    """Measure one line of the table."""
    work = SameTraining(name, dtype, batch, steps)
    ways: dict[str, Callable[[], Turn]] = {
        "TRL": work.trl,
        "fedelta": lambda: work.fedelta(packing=False),
        "packed": lambda: work.fedelta(packing=True),
    }
    # The first turn warms up.
    measured = [{way: measure() for way, measure in ways.items()} for _ in range(turns + 1)][1:]
    loss = measured[0]["TRL"].loss
    off = max(abs(turn[way].loss - loss) / loss for turn in measured for way in ways)
    lengths = sorted(work.examples.lengths)
    cells = [
        Path(name).name,
        dtype,
        str(batch),
        f"{lengths[0]}, {lengths[len(lengths) // 2]}, {lengths[-1]}",
        f"{work.tokens / median(turn['TRL'].seconds for turn in measured):.0f}",
    ]
    for way in ("fedelta", "packed"):
        ratios = [turn["TRL"].seconds / turn[way].seconds for turn in measured]
        cells.append(f"{median(ratios):.2f}× ({min(ratios):.2f} to {max(ratios):.2f})")
    return [*cells, f"{off:.0e}"]


HEAD = ["model", "type", "batch", "tokens of a text (shortest, median, longest)", "TRL, tokens/s", "fedelta"]
HEAD += ["fedelta, `packing: true`", "largest relative difference of losses"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="name or folder (default: smollm2)")
    parser.add_argument("--batch", type=int, default=8, help="texts per step (default: 8)")
    parser.add_argument("--steps", type=int, default=2, help="steps in a turn (default: 2)")
    parser.add_argument("--turns", type=int, default=3, help="measured turns (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/README.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    machine = Machine.measure()
    rows = []
    for dtype in ("float32", "bfloat16"):
        rows.append(row(arguments.model, dtype, arguments.batch, arguments.steps, arguments.turns))
        print(" | ".join(rows[-1]), flush=True)
    text = f"{machine.describe()} {arguments.turns} turns of {arguments.steps} steps.\n\n{table(HEAD, rows)}"
    print(f"\n{text}")
    if arguments.write:
        keep("trl", text)


if __name__ == "__main__":
    main()
