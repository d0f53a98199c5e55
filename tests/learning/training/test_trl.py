"""One client without a federation trains as TRL's `SFTTrainer` does: same tokens, same losses, same adapter.

What must be set in TRL for this:

- `bf16=False`: it computes in bfloat16 by default, even on a CPU. `gradient_checkpointing=False` only saves time.
- `optim="adamw_torch"`: its default is the fused kernel, which rounds differently. Betas and ε have the same defaults.
- `train_sampling_strategy="sequential"`: it draws another order from the same seed. The rows come in fedelta's order.
- `warmup_steps`: a number of steps. TRL rounds a share up, fedelta rounds it down.
- `max_length` above the longest text. TRL cuts the end of a text, and fedelta the beginning of a long prompt.
- The tokenizer's padding token and side, and the chat template, are taken as they are.

Its loss is that of fedelta: the sum over the labels of a step divided by their number, computed in chunks.

Tokens differ in two places. The line break that a chat template puts after an end token is not part of fedelta's text,
but TRL reads it, without a label. Where a token spans the end of a prompt, fedelta tokenizes prompt and completion
separately, while TRL trains on another prompt than generation sees. No text of these cases has such a token.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from causal import SHAPE, TASK, build_tokenizer, write_rows
from chats import BRACKETS, CHATML, byte_tokenizer
from comparisons import distance
from fedelta.learning.data import DataSettings, Examples
from fedelta.learning.data.examples import IGNORED
from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.learning.tasks import Completion
from fedelta.learning.training import TrainingSettings, train
from fedelta.lora.adapter import Adapter, LoraPair, initial_adapter
from fedelta.seeds import derive_seed

RANK, ALPHA, SEED = 3, 6.0, 5
STEPS, BATCH = 20, 8
Row = dict[str, Any]

GENERATED = CHATML.replace(
    "{{ m.content }}<end>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>{% endgeneration %}"
    "{% else %}{{ m.content }}<end>{% endif %}",
)
"""A template that marks what an assistant writes, including the end token, as `assistant_only_loss` needs it."""


@dataclass(frozen=True)
class Case:
    """The same texts for both trainers.

    Args:
        tokenizer: their tokenizer.
        examples: their tokens in fedelta.
        rows: the same texts as TRL reads them.
        options: options of `SFTConfig` that say on which tokens the loss is.
    """

    tokenizer: Any
    examples: Examples
    rows: list[Row]
    options: dict[str, Any]


def plain_texts(texts: list[tuple[str, str]]) -> Case:
    tokenizer = build_tokenizer()
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in texts]
    return Case(tokenizer, completions(texts, tokenizer, chat=False), rows, {"completion_only_loss": True})


def marked_turns(texts: list[tuple[str, str]]) -> Case:
    tokenizer = byte_tokenizer(GENERATED)
    rows = [{"messages": [turn("user", one), turn("assistant", other)]} for one, other in texts]
    return Case(tokenizer, completions(texts, tokenizer, chat=True), rows, {"assistant_only_loss": True})


def prompt_and_answer_as_turns(texts: list[tuple[str, str]]) -> Case:
    """A template whose answers end in the end token, so that no mark is needed."""
    tokenizer = byte_tokenizer(BRACKETS)
    rows = [{"prompt": [turn("user", one)], "completion": [turn("assistant", other)]} for one, other in texts]
    return Case(tokenizer, completions(texts, tokenizer, chat=True), rows, {"completion_only_loss": True})


def turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def completions(texts: list[tuple[str, str]], tokenizer: Any, chat: bool) -> Examples:
    rows = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in texts])
    return Completion(chat=chat).examples(rows, DataSettings(max_length=128), (), tokenizer)


@pytest.fixture
def texts(tmp_path: Path) -> list[tuple[str, str]]:
    """Prompts and completions of unequal lengths: ten batches, so that an epoch has no short one."""
    file = write_rows(tmp_path / "things.jsonl", STEPS * BATCH // 2)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [(TASK["prompt"].format(**row), TASK["completion"].format(**row)) for row in rows]


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """A function that writes a Llama with random weights for a tokenizer, and draws an adapter on all linear layers."""

    def make(tokenizer: Any) -> tuple[Path, Adapter]:
        torch.manual_seed(0)
        shape = SHAPE | {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
        AutoModelForCausalLM.from_config(LlamaConfig(**shape)).save_pretrained(tmp_path / "llama")
        shapes = new_lora_model(tmp_path / "llama").shapes
        # B of a new adapter is zero. Random factors give all parameters a gradient in the first step.
        drawn = initial_adapter(shapes, RANK, 0).map(
            lambda pair: LoraPair(pair.A, 0.1 * torch.randn(pair.B.shape), ALPHA / RANK)
        )
        return tmp_path / "llama", drawn

    return make


def new_lora_model(folder: Path) -> LoraModel:
    base = AutoModelForCausalLM.from_pretrained(folder)
    return LoraModel(base, LoraSettings(alpha=ALPHA, target_modules="all-linear"))


def trained_by_fedelta(
    folder: Path, start: Adapter, case: Case, settings: TrainingSettings
) -> tuple[list[float], dict[str, Tensor]]:
    """Return the loss of each step and the trained factors."""
    model = new_lora_model(folder)
    model.load(start, {})
    steps: list[list[tuple[float, int]]] = [[]]

    def record(_: Any, __: Any, inputs: Mapping[str, Tensor], outputs: Any) -> None:
        steps[-1].append((float(outputs.loss.detach()), int((inputs["labels"][:, 1:] != IGNORED).sum())))

    def end_step() -> None:
        steps.append([])

    model.peft.register_forward_hook(record, with_kwargs=True)
    loss = train(model, case.tokenizer, case.examples, settings, SEED, penalty=end_step)
    losses = [math.fsum(loss * n for loss, n in step) / sum(n for _, n in step) for step in steps[:-1]]
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    return losses, factors(model.read())


def factors(adapter: Adapter) -> dict[str, Tensor]:
    return {f"{module}.{name}": getattr(pair, name) for module, pair in adapter.items() for name in "AB"}


def trained_by_trl(
    folder: Path, start: Adapter, case: Case, settings: TrainingSettings, order: Sequence[int]
) -> tuple[list[float], dict[str, Tensor], Any]:
    """Return the loss of each step, the trained factors, and TRL's tokens and labels in the order of training."""
    import peft
    from trl import SFTConfig, SFTTrainer

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    layers = {name: model.get_submodule(f"base_model.model.{name}") for name in start}
    with torch.no_grad():
        for name, pair in start.items():
            layers[name].lora_A["default"].weight.copy_(pair.A)
            layers[name].lora_B["default"].weight.copy_(pair.B)
            assert layers[name].scaling["default"] == pair.scale
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        warmup_steps=int(settings.warmup * STEPS),
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        max_length=128,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **case.options,
    )
    rows = Dataset.from_list([case.rows[row] for row in order])
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=case.tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = {
        f"{name}.{factor}": getattr(layer, f"lora_{factor}")["default"].weight.detach()
        for name, layer in layers.items()
        for factor in "AB"
    }
    return losses, trained, trainer.train_dataset


@pytest.mark.parametrize("build", [plain_texts, marked_turns, prompt_and_answer_as_turns])
@pytest.mark.parametrize("schedule", [{"schedule": "constant"}, {"schedule": "cosine", "warmup": 0.2}])
def test_one_client_trains_as_trl_does(build: Any, schedule: dict[str, Any], texts: Any, start: Any) -> None:
    case = build(texts)
    folder, adapter = start(case.tokenizer)
    settings = TrainingSettings(
        epochs=2, batch_size=BATCH, learning_rate=0.02, weight_decay=0.01, max_grad_norm=0.5, **schedule
    )
    order = [
        row
        for epoch in (0, 1)
        for rows in case.examples.training_order(BATCH, derive_seed(SEED, "epoch", epoch))
        for row in rows
    ]
    losses, trained = trained_by_fedelta(folder, adapter, case, settings)
    expected_losses, expected, theirs = trained_by_trl(folder, adapter, case, settings, order)
    for row, tokens, labels in zip(order, theirs["input_ids"], theirs["labels"], strict=True):
        own = case.examples.features[row]["input_ids"]
        assert tokens[: len(own)] == own
        # The line break after the last end token, if the template has one.
        assert case.tokenizer.decode(tokens[len(own) :]) in ("", "\n")
        assert labels == [*case.examples.labels[row], *[IGNORED] * (len(tokens) - len(own))]
    assert len(losses) == len(expected_losses) == STEPS
    assert losses == pytest.approx(expected_losses, abs=1e-4)
    assert losses[-1] < 0.7 * losses[0], "the model has learned"
    before = factors(adapter)
    for name, tensor in expected.items():
        assert distance(trained[name], tensor) < 1e-4 < distance(before[name], tensor), name
