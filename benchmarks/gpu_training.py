"""Benchmark of one client's training, compared with common loops, and of several clients in one pass."""

import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from gpu_models import CAUSAL, lora_model, random_adapter, texts, tokenizer, words_of
from gpu_report import Bench, Row
from simulation import texts as news
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from fedelta.learning.data import Examples
from fedelta.learning.device import synchronize
from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.learning.training import TrainingSettings, train
from fedelta.learning.training.stacked import StackedClient, train_stacked

RANK = 16
RATE = 1e-4


class OneClient:
    """LoRA training of one client of a causal model. Each method has the same model, texts, batches and optimizer.

    Args:
        batch, length: number of texts per step, and number of tokens per text.
        warm, steps: number of warm-up steps, and number of measured steps.
    """

    def __init__(self, bench: Bench, shape: str, batch: int, length: int, warm: int, steps: int) -> None:
        self.bench = bench
        self.batch, self.length, self.warm, self.steps = batch, length, warm, steps
        settings = LoraSettings(target_modules="all-linear")
        self.model = lora_model(shape, settings, bench.device, checkpointing=True, toy=bench.smoke)
        self.tokenizer = tokenizer()
        self.examples = texts([length] * batch * steps, words_of(self.model), causal=True)
        self.start = random_adapter(self.model, RANK, seed=0)
        self.plain: float | None = None

    def rows(self) -> list[dict[str, Any]]:
        pairs = zip(self.examples.features, self.examples.labels, strict=True)
        return [{**feature, "labels": label} for feature, label in pairs]

    def fedelta(self, deterministic: bool) -> float:
        settings = TrainingSettings(batch_size=self.batch, learning_rate=RATE, deterministic=deterministic)

        def steps(number: int) -> None:
            train(self.model, self.tokenizer, self.examples, settings.model_copy(update={"steps": number}), seed=0)

        self.model.load(self.start, {})
        steps(self.warm)
        self.bench.forget_peak()
        return self.bench.seconds(lambda: steps(self.steps))

    def peft_loop(self) -> float:
        """Seconds of a plain training loop."""
        model, device = self.model.peft, self.bench.device
        collate = transformers.DataCollatorForSeq2Seq(self.tokenizer)

        def steps(number: int) -> None:
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
            batches = DataLoader(self.rows(), batch_size=self.batch, shuffle=True, collate_fn=collate)
            model.train()
            for _, batch in zip(range(number), _forever(batches), strict=False):
                model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss.backward()
                clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()

        self.model.load(self.start, {})
        steps(self.warm)
        self.bench.forget_peak()
        return self.bench.seconds(lambda: steps(self.steps))

    def hugging_face(self) -> float:
        """Seconds of `transformers.Trainer`, without its preparations."""
        self.model.load(self.start, {})
        clock = _Clock(self.bench, self.warm)
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                output_dir=folder,
                max_steps=self.warm + self.steps,
                per_device_train_batch_size=self.batch,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
                use_cpu=self.bench.device.type == "cpu",
            )
            collate = transformers.DataCollatorForSeq2Seq(self.tokenizer)
            trainer = transformers.Trainer(
                self.model.peft, arguments, data_collator=collate, train_dataset=self.rows(), callbacks=[clock]
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        return clock.end - clock.begin

    def row(self, shape: str, way: str, measure: Callable[[], float]) -> Row:
        seconds = measure()
        if way == PLAIN:
            self.plain = seconds
        tokens = self.steps * self.batch * self.length / seconds
        once, again = flops_per_token(self.model, self.length)
        return {
            "model": shape,
            "tokens a step": self.batch * self.length,
            "way": way,
            "tokens/s": tokens,
            "share of the bf16 peak": f"{tokens * once / self.bench.rate:.1%}",
            "with recomputation": f"{tokens * again / self.bench.rate:.1%}",
            "speed, the plain loop is 1": self.plain / seconds if self.plain else None,
            "peak memory, GB": self.bench.peak(),
        }


PLAIN = "plain PEFT loop"


class _Clock(transformers.TrainerCallback):
    def __init__(self, bench: Bench, warm: int) -> None:
        self.bench, self.warm = bench, warm
        self.begin = self.end = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.global_step == self.warm:
            self.bench.forget_peak()
            self.begin = _now(self.bench)
        self.end = _now(self.bench) if state.global_step == state.max_steps else self.end


def _now(bench: Bench) -> float:
    synchronize(bench.device)
    return time.perf_counter()


def _forever(batches: Any) -> Iterator[Any]:
    while True:
        yield from batches


def flops_per_token(model: LoraModel, length: int) -> tuple[float, float]:
    """FLOPs per trained token of a causal text, without and with recomputation of activations.

    A frozen layer of P weights takes 2P forward and 2P backward, for the gradient of its input only. LoRA's p weights
    take 2p forward and 4p backward. On average a token attends to half of the others, which takes 2·length·width per
    layer forward, for scores and values, and twice that backward. Checkpointing repeats the forward pass of all layers
    except the head over the vocabulary.
    """
    config = model.peft.config
    base = model.peft.get_base_model()
    frozen = sum(
        module.weight.numel()
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    )
    head = base.get_output_embeddings().weight.numel()
    lora = sum(RANK * (m + n) for m, n in model.shapes.values())
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention = 2 * length * width * config.num_hidden_layers
    forward = 2 * frozen + 2 * lora + attention
    once = forward + 2 * frozen + 4 * lora + 2 * attention
    return once, once + forward - 2 * head


def training(bench: Bench) -> None:
    bench.begin(
        "training",
        "Training of one client",
        f"""LoRA of rank {RANK} on all linear layers, with a bf16 base, fp32 adapters, gradient checkpointing, AdamW and
        clipped gradients. The share of the peak counts each necessary operation once. With recomputation it also counts
        the operations that checkpointing repeats. Tokens per second include collating and, except for the Trainer, the
        creation of the optimizer.""",
    )
    warm, steps = (1, 2) if bench.smoke else (2, 6)
    batch, length = (2, 8) if bench.smoke else (8, 512)
    for shape, estimate in (("Llama-3.2-1B", 6.0), ("Mistral-7B", 12.0)):
        made: list[OneClient] = []

        def build(shape: str = shape, made: list[OneClient] = made) -> None:
            made.append(OneClient(bench, shape, batch, length, warm, steps))

        if not bench.measure(f"{shape}: building it", 2 * estimate, build):
            continue
        work = made.pop()
        ways: dict[str, Callable[[], float]] = {
            PLAIN: work.peft_loop,
            "fedelta": lambda work=work: work.fedelta(True),
            "fedelta, deterministic: false": lambda work=work: work.fedelta(False),
            "transformers.Trainer": work.hugging_face,
        }
        for way, measure in ways.items():
            bench.measure(f"{shape}: {way}", estimate, lambda way=way, m=measure, w=work: w.row(shape, way, m))  # noqa: B023
        del work, ways, measure
        bench.free()


def stacks(bench: Bench) -> None:
    bench.begin(
        "stacks",
        "Clients in one pass",
        """Client steps per second of clients that train in one pass, and of the same clients one by one, with rank 16
        on all linear layers. MiniLM: fp32, texts with the lengths of AG News. Llama-3.2-1B: bf16, gradient
        checkpointing, texts of 64 tokens.""",
    )
    numbers = (2, 3) if bench.smoke else (4, 16, 64, 100)
    for shape in ("MiniLM", "Llama-3.2-1B"):
        causal = shape in CAUSAL
        estimate = 8.0 if causal else 3.0
        made: list[LoraModel] = []

        def build(shape: str = shape, causal: bool = causal, made: list[LoraModel] = made) -> None:
            settings = LoraSettings(target_modules="all-linear")
            dtype = torch.bfloat16 if causal else torch.float32
            made.append(lora_model(shape, settings, bench.device, dtype, checkpointing=causal, toy=bench.smoke))

        if not bench.measure(f"{shape}: building it", estimate, build):
            continue
        model = made.pop()
        for batch in (2, 8):
            work = Stacks(bench, model, causal, batch)
            what = f"{shape}, batch {batch}"
            if not bench.measure(f"{what}: one by one", estimate, work.measure_alone):
                continue
            for number in numbers:
                bench.measure(f"{what}: {number} clients", estimate, lambda n=number, w=work: w.row(shape, n))  # noqa: B023
            del work
        del model
        bench.free()


class Stacks:
    """Clients of equal size that train in one pass or one by one."""

    WARM, STEPS, ALONE = 1, 3, 4

    def __init__(self, bench: Bench, model: LoraModel, causal: bool, batch: int) -> None:
        self.bench, self.model, self.batch, self.causal = bench, model, batch, causal
        self.tokenizer = tokenizer()
        self.heads = model.head_tensors()
        self.start = random_adapter(model, RANK, seed=0)
        self.alone = 0.0

    def client(self, seed: int) -> StackedClient:
        count = self.batch * self.STEPS
        return StackedClient(self.start, self.heads, self._examples(count, seed), seed)

    def _examples(self, count: int, seed: int) -> Examples:
        if self.causal:
            return texts([8 if self.bench.smoke else 64] * count, words_of(self.model), causal=True, seed=seed)
        examples = news(count, seed)
        limit = words_of(self.model)
        rows = [{"input_ids": [token % limit for token in row["input_ids"]]} for row in examples.features]
        return Examples(rows, examples.labels)

    def settings(self, steps: int) -> TrainingSettings:
        return TrainingSettings(steps=steps, batch_size=self.batch, learning_rate=RATE)

    def measure_alone(self) -> None:
        clients = [self.client(seed) for seed in range(2 if self.bench.smoke else self.ALONE)]

        def all_of_them(steps: int) -> None:
            for client in clients:
                self.model.load(client.adapter, client.heads)
                train(self.model, self.tokenizer, client.examples, self.settings(steps), client.seed)

        all_of_them(self.WARM)
        self.alone = len(clients) * self.STEPS / self.bench.seconds(lambda: all_of_them(self.STEPS))

    def row(self, shape: str, number: int) -> Row:
        clients = [self.client(seed) for seed in range(number)]
        row = {"model": shape, "batch": self.batch, "clients": number, "one by one, client steps/s": self.alone}

        def in_one_pass(steps: int) -> None:
            train_stacked(self.model, self.tokenizer, clients, self.settings(steps))

        self.bench.forget_peak()
        try:
            in_one_pass(self.WARM)
            rate = number * self.STEPS / self.bench.seconds(lambda: in_one_pass(self.STEPS))
        except torch.OutOfMemoryError:
            # The number of clients that fit is a result, not a failure.
            return row | {"in one pass": "out of memory"}
        return row | {"in one pass": rate, "ratio": rate / self.alone, "peak memory, GB": self.bench.peak()}
