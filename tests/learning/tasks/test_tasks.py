"""Tasks: tokens that count in the loss, scores, and refused settings."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from causal import SPECIAL, TASK, WORDS, build_tokenizer
from fedelta.errors import FedeltaError
from fedelta.learning.data import DataSettings
from fedelta.learning.data.examples import IGNORED, Completions, Examples
from fedelta.learning.data.sources import load_splits
from fedelta.learning.model.activation_cache import find_activation_cache
from fedelta.learning.model.base_model import ModelSettings, load_base, load_tokenizer
from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.learning.shards import read_splits
from fedelta.learning.tasks import Completion, Regression, Unit, evaluate
from fedelta.learning.tasks.generation import Generation, generate
from fedelta.learning.tasks.plain import CutWarning
from fedelta.learning.training import TrainingSettings, local, train
from fedelta.learning.training.loss import mean_loss, row_losses
from fedelta.learning.training.stacked import StackedClient, reason_not_to_stack, train_stacked
from fedelta.runs.runner import run

BEGIN, END = 1, 2


def colors(things: Path, tokenizer: Any, length: int = 32, **task: Any) -> Completions:
    settings, completion = DataSettings(source=str(things), max_length=length), Completion(**(TASK | task))
    splits = load_splits(settings, completion.columns(settings))
    return completion.examples(splits["train"], settings, [], tokenizer)


def model_of(folder: Path, **lora: Any) -> tuple[LoraModel, Any]:
    settings = ModelSettings(name=str(folder))
    tokenizer = load_tokenizer(settings)
    base = load_base(settings, 0, tokenizer, 0, "completion")
    torch.manual_seed(0)  # PEFT draws A.
    return LoraModel(base, LoraSettings(**({"target_modules": "all-linear"} | lora))), tokenizer


def test_the_loss_counts_only_the_completion_and_its_end(things: Path) -> None:
    tokenizer = build_tokenizer()
    examples = colors(things, tokenizer)
    for i in range(len(examples)):
        tokens, labels = examples.features[i]["input_ids"], examples.labels[i]
        prompt = examples.prompts[i]
        assert tokens[0] == BEGIN
        assert tokenizer.decode(prompt, skip_special_tokens=True).startswith("the color of")
        assert tokenizer.decode(prompt).endswith(":")
        assert tokenizer.decode(tokens[len(prompt) :]) == examples.references[i] + " </s>"
        assert labels == [IGNORED] * len(prompt) + tokens[len(prompt) :]
    assert examples.weight([0, 1, 2]) == 9


def test_a_prompt_that_is_too_long_loses_its_beginning(things: Path) -> None:
    whole = colors(things, build_tokenizer())
    with pytest.warns(CutWarning, match=f"{len(whole)} of {len(whole)} texts are longer than data.max_length"):
        cut = colors(things, build_tokenizer(), 6)
    for i in range(len(whole)):
        # The token that begins a text stays.
        assert cut.features[i]["input_ids"] == [BEGIN, *whole.features[i]["input_ids"][-5:]]
        assert cut.weight([i]) == 3
        assert cut.prompts[i] == [BEGIN, *whole.prompts[i][-5:]]


def test_a_completion_that_is_too_long_leaves_the_prompt_half_of_the_length(things: Path) -> None:
    long = {"prompt": "{thing} is :", "completion": " the color of {thing} is {answer} ."}
    with pytest.warns(CutWarning):
        cut = colors(things, build_tokenizer(), 7, **long)
    assert all(label[:4] == [IGNORED] * 4 and IGNORED not in label[4:] for label in cut.labels)


def test_completions_longer_than_generated_answers_raise_a_warning(things: Path) -> None:
    generate = {"max_new_tokens": 2}
    with pytest.warns(CutWarning, match=r"(\d+) of \1 completions are longer than task\.generate\.max_new_tokens 2"):
        colors(things, build_tokenizer(), generate=generate)


def test_a_truncated_prompt_does_not_depend_on_the_answer(things: Path) -> None:
    with pytest.warns(CutWarning):
        short, long = (colors(things, build_tokenizer(), 6, completion=c) for c in (" {answer}", " {answer} . . . . ."))
    assert short.prompts == long.prompts


def test_a_token_that_spans_prompt_and_completion_belongs_to_the_completion(things: Path) -> None:
    """If a token includes the space before its word, as in Llama's vocabulary, a prompt may end within a token."""
    words = sorted({f"▁{word}" for word in WORDS} | {*WORDS, "▁"})
    joined = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    joined.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=joined, pad_token="<pad>", eos_token="</s>")
    seam = colors(things, tokenizer, prompt="the color of {article} {thing} is : ", completion="{answer} .")
    clean = colors(things, tokenizer)
    for i in range(len(seam)):
        tokens, labels = seam.features[i]["input_ids"], seam.labels[i]
        assert tokens == clean.features[i]["input_ids"], "both are tokenized as one text"
        learned = tokenizer.convert_ids_to_tokens([token for token in labels if token != IGNORED])
        assert learned == [f"▁{seam.references[i].split()[0]}", "▁.", "</s>"]
        assert seam.prompts[i] == tokens[: len(tokens) - 3]


def test_a_chat_template_turns_prompt_and_completion_into_turns(things: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }} "
        "{% if m.role == 'assistant' %}</s> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    with_turns, plain = (colors(things, tokenizer, chat=chat) for chat in (None, False))
    assert tokenizer.decode(with_turns.prompts[0]).endswith("<unk> :"), "the assistant's turn has begun"
    answer = with_turns.features[0]["input_ids"][len(with_turns.prompts[0]) :]
    assert tokenizer.decode(answer).split() == [*with_turns.references[0].split(), "</s>"]
    assert plain.prompts[0][0] == BEGIN
    with pytest.warns(CutWarning):
        cut = colors(things, tokenizer, 10)
    assert {text["input_ids"][0] for text in cut.features} == {with_turns.prompts[0][0]}
    for short, long in zip(cut.prompts, with_turns.prompts, strict=True):
        header = 2  # «user :», which is never truncated
        assert short == [*long[:header], *long[header:][-(10 - header) :]]
    with pytest.raises(FedeltaError, match=r"data\.max_length 3 leaves no space after the 2 tokens before each prompt"):
        colors(things, tokenizer, 3)
    for template, reason in (
        ("{{ messages[0].content }}", "puts no special token after an answer"),
        ("{{ x.y }}", "fails"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(FedeltaError, match=f"chat template {reason}"):
            colors(things, tokenizer)
    with pytest.raises(
        FedeltaError,
        match=r"the tokenizer.* has no chat template, which task\.chat: true needs; task\.chat_template names",
    ):
        colors(things, build_tokenizer(), chat=True)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_losses_of_a_batch_equal_those_of_each_text_alone(padding: str, causal: Any, things: Path) -> None:
    model, tokenizer = model_of(causal("llama"))
    examples = colors(things, tokenizer)
    tokenizer.padding_side = padding
    rows = [0, 1, 2, 3, 4, 5]
    outcomes = Completion(**TASK).evaluate_batch(model, tokenizer, examples, Unit("forward", rows))
    for row, (loss, count, _) in zip(rows, outcomes, strict=True):
        tokens = torch.tensor([examples.features[row]["input_ids"]])
        known = len(examples.prompts[row])
        logits = model.peft(input_ids=tokens).logits[0]
        assert count == tokens.shape[1] - known
        assert loss == pytest.approx(
            float(cross_entropy(logits[known - 1 : -1], tokens[0, known:], reduction="sum")), rel=1e-4
        )


def test_the_loss_is_a_mean_over_tokens(causal: Any, things: Path) -> None:
    model, tokenizer = model_of(causal("llama"))
    examples = colors(things, tokenizer, completion=" {answer} {article} .")
    task = Completion(**TASK)
    units = [Unit("forward", [row]) for row in range(len(examples))]
    outcomes = [task.evaluate_batch(model, tokenizer, examples, unit)[0] for unit in units]
    assert len({count for _, count, _ in outcomes}) > 1
    scores = evaluate(task, model, tokenizer, examples, 7)
    mean = sum(loss for loss, *_ in outcomes) / sum(count for _, count, _ in outcomes)
    assert scores["loss"] == pytest.approx(mean, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_a_step_in_parts_equals_a_step_of_the_whole_batch(
    causal: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"thing": "ship", "article": "a", "answer": "red", "filler": " old" * (i % 17)} for i in range(60)]
    things = tmp_path / "x.jsonl"
    things.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = []
    parts: list[int] = []
    monkeypatch.setattr(local, "_parts", lambda *a, real=local._parts: parts.append(len(real(*a))) or real(*a))
    for how in ({"micro_batches": False}, {"micro_batches": True}, {"micro_batches": False, "micro_batch_size": 2}):
        model, tokenizer = model_of(causal("llama"))
        examples = colors(things, tokenizer, completion=" {answer}{filler} .").select(list(range(24)))
        assert len({examples.length(row) for row in range(24)}) > 8
        loss = train(
            model, tokenizer, examples, TrainingSettings(steps=3, batch_size=8, optimizer="sgd", **how), seed=1
        )
        results.append((loss, model.read()))
    (loss, whole), *others = results
    assert parts[:3] == [1, 1, 1]
    assert max(parts[3:6]) > 1
    assert parts[6:] == [4, 4, 4]
    for other_loss, other in others:
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for module, pair in whole.items():
            torch.testing.assert_close(other[module].B, pair.B, rtol=1e-3, atol=1e-6)
    assert any(bool(pair.B.abs().max() > 0) for pair in whole.values())


def test_the_loss_equals_the_models_own(causal: Any, things: Path) -> None:
    model, tokenizer = model_of(causal("llama"))
    examples = colors(things, tokenizer, completion=" {answer} {article} .")
    batch = examples.batch(list(range(9)), tokenizer)
    output = model.peft(**batch)
    assert float(output.loss) == pytest.approx(float(mean_loss(output.logits, batch["labels"])), rel=1e-5)
    losses, counts = row_losses(output.logits, batch["labels"])
    assert int(counts.sum()) == examples.weight(list(range(9)))
    assert float(output.loss) == pytest.approx(float(losses.sum() / counts.sum()), rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_clients_in_one_pass_train_as_they_do_alone(architecture: str, causal: Any, things: Path) -> None:
    model, tokenizer = model_of(causal(architecture))
    examples = colors(things, tokenizer, completion=" {answer} {article} .")
    settings = TrainingSettings(steps=3, batch_size=4, optimizer="sgd")
    clients = []
    for k, rank in enumerate((2, 3, 4)):
        model.prepare(rank)
        start = model.read().map(lambda pair: pair.with_scale(1.0))
        clients.append(StackedClient(start, {}, examples.select(list(range(k * 10, k * 10 + 10))), seed=k))
    together = train_stacked(model, tokenizer, clients, settings)
    for client, stacked in zip(clients, together, strict=True):
        model.load(client.adapter, {})
        loss = train(model, tokenizer, client.examples, settings, client.seed)
        assert stacked.loss == pytest.approx(loss, rel=1e-4)
        for module, pair in model.read().items():
            torch.testing.assert_close(stacked.adapter[module].B, pair.B, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_of_prompts_has_the_answers_of_each_prompt_alone(beams: int, causal: Any, things: Path) -> None:
    model, tokenizer = model_of(causal("llama"))
    examples = colors(things, tokenizer)
    train(model, tokenizer, examples, TrainingSettings(epochs=12, learning_rate=0.02), seed=0)
    prompts = [examples.prompts[row] for row in range(12)]
    assert len({len(prompt) for prompt in prompts}) > 1
    settings = Generation(max_new_tokens=5, beams=beams)
    together = generate(model, tokenizer, prompts, settings)
    assert together == [generate(model, tokenizer, [prompt], settings)[0] for prompt in prompts]
    assert sum(text == reference for text, reference in zip(together, examples.references, strict=False)) >= 10


def test_a_run_learns_to_complete_and_is_scored_by_generated_text(causal_config: Any) -> None:
    task = TASK | {"generate": {"max_new_tokens": 4}, "answer": "text", "metric": "exact"}
    finished = run(causal_config(rounds=6, task=task, training={"epochs": 2, "batch_size": 8, "learning_rate": 0.02}))
    scores = [record["validation"]["exact"] for record in finished.records]
    assert scores[0] < scores[-1]
    assert finished.result["test"]["exact"] > 0.9
    assert finished.result["test"]["loss"] < finished.records[0]["validation"]["loss"]


def test_a_run_whose_metric_is_the_loss_generates_text_only_for_the_final_test(causal_config: Any) -> None:
    task = TASK | {"generate": {"max_new_tokens": 4, "limit": 5}, "answer": "text"}
    finished = run(causal_config(task=task))
    assert all(set(record["validation"]) == {"loss", "perplexity"} for record in finished.records)
    assert set(finished.result["test"]) == {"loss", "perplexity", "exact"}


def test_equal_prompts_are_answered_once_and_compared_with_all_references(tmp_path: Path) -> None:
    rows = [{"mr": f"color {i // 2}", "ref": word, "key": i // 2} for i, word in enumerate(["red", "blue", "green"])]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    settings = DataSettings(source=str(file), test=0.2)
    generate = Generation(max_new_tokens=3)
    shared = {"prompt": "{mr} :", "completion": "{ref}", "generate": generate, "answer": "text", "by": "mr"}
    for group in (None, "key"):
        task = Completion(**shared, group=group)
        rows = load_splits(settings, task.columns(settings))["train"]
        examples = task.examples(rows, settings, [], build_tokenizer())
        units = [unit for unit in task.units(examples, 4, final=True) if unit.kind == "generate"]
        prompt_rows = [row for unit in units for row in unit.rows]
        assert len(prompt_rows) == len(examples.by_group) == 2
        assert not [unit for unit in task.units(examples, 4, final=False) if unit.kind == "generate"]
        texts = [[["red"] if examples.references[row] in ("red", "blue") else ["no"] for row in u.rows] for u in units]
        passes = [Unit("forward", list(range(len(examples))))]
        scores = task.score(examples, [*passes, *units], [[[1.0, 1, None]] * len(examples), *texts])
        assert scores["exact"] == 0.5
        assert (scores["exact/color 0"], scores["exact/color 1"]) == (1, 0)


def test_every_kind_of_question_has_the_same_weight_in_the_macro_mean(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": "red", "task": "many" if i else "one"} for i in range(16)]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings(source=str(file), test=0.01)
    shared = {"prompt": "{question} :", "completion": "{answer}", "answer": "text", "by": "task"}
    task = Completion(**shared, metric="exact_macro", generate=Generation(max_new_tokens=3))
    examples = task.examples(load_splits(settings, task.columns(settings))["train"], settings, [], build_tokenizer())
    units = task.units(examples, 4, final=False)
    scores = task.score(
        examples,
        units,
        [
            [
                [1.0, 1, None] if unit.kind == "forward" else ["red" if examples.kinds[row] == "many" else "no"]
                for row in unit.rows
            ]
            for unit in units
        ],
    )
    many, one = scores["exact/many"], scores["exact/one"]
    assert (many, one) == (1, 0)
    assert scores["exact_macro"] == 0.5
    assert scores["exact"] == (len(examples) - 1) / len(examples)
    with pytest.raises(ValueError, match="metric exact_macro is not computed, found loss, perplexity, exact"):
        Completion(**shared | {"by": None}, metric="exact_macro", generate=Generation())


def test_a_regression_learns_and_is_scored_by_correlation(tiny_config: Any, texts: Path, tmp_path: Path) -> None:
    lines = texts.read_text().splitlines()
    value = {"sea": "0.5", "sky": "2.5", "land": "4.5"}
    file = tmp_path / "numbers.csv"
    changed = [
        ",".join([text, value[label], author]) for text, label, author in (line.split(",") for line in lines[1:])
    ]
    file.write_text("\n".join([lines[0], *changed]) + "\n")
    finished = run(
        tiny_config(
            task="regression",
            data={"source": str(file), "max_length": 16},
            training={"epochs": 3, "batch_size": 8, "learning_rate": 0.01},
            rounds=10,
        )
    )
    assert set(finished.result["test"]) == {"loss", "pearson", "spearman"}
    assert finished.result["test"]["pearson"] > 0.5
    assert finished.result["classes"] == []
    assert finished.result["constant_score"] is None


def test_the_loss_of_a_regression_is_the_squared_error() -> None:
    logits, labels = torch.tensor([[1.0], [3.0]]), torch.tensor([2.0, 5.0])
    assert row_losses(logits, labels)[0].tolist() == [1.0, 4.0]
    assert Regression().own_scores([1.0, 1.0], [2.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}


def test_a_regression_refuses_labels_that_are_not_numbers(texts: Path) -> None:
    settings = DataSettings(source=str(texts))
    with pytest.raises(FedeltaError, match="line 2: column 'label' holds 'sea', expected numbers"):
        read_splits(settings, Regression())


def test_the_weight_of_a_part_is_its_number_of_texts_or_predicted_tokens() -> None:
    assert Examples([{"input_ids": [1]}] * 3, [0, 1, 2]).weight([0, 2]) == 2
    assert Examples([{"input_ids": [1, 2, 3]}], [[1, IGNORED, 3]]).weight([0]) == 1


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ({"kind": "completion", "prompt": "no column"}, "task.prompt: expected a column in braces"),
        ({"kind": "completion", "metric": "bleu"}, "metric bleu is not computed, found loss, perplexity"),
        ({"kind": "completion", "answer": "number"}, "scores and answer need generated text"),
        ({"metric": "pearson"}, "task.metric: input should be 'accuracy'"),
        ({"kind": "summary"}, "task: 'kind' should be one of .* found 'summary'"),
    ],
)
def test_invalid_settings_of_a_task_are_refused(task: dict, reason: str, tiny_config: Any) -> None:
    with pytest.raises(FedeltaError, match=reason):
        tiny_config(task=task)


def test_an_encoder_is_refused_as_a_causal_language_model(tiny_bert: Path) -> None:
    settings = ModelSettings(name=str(tiny_bert))
    with pytest.raises(FedeltaError, match="lack the weight cls.* expected a causal language model"):
        load_base(settings, 0, load_tokenizer(settings), 0, "completion")


def test_a_missing_column_is_named(causal_config: Any) -> None:
    with pytest.raises(FedeltaError, match="no column 'question' in split train"):
        run(causal_config(task=TASK | {"prompt": "{question}"}))


def test_a_draw_takes_whole_groups(tmp_path: Path) -> None:
    rows = [{"mr": f"m{i // 4}", "ref": f"r{i}", "key": i // 4} for i in range(200)]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings(source=str(file), limit=50, evaluation_limit=14)
    task = Completion(prompt="{mr}", completion="{ref}", group="key")
    splits, _ = read_splits(settings, task)
    keys = {name: split["key"][:] for name, split in splits.items()}
    assert {name: len(column) for name, column in keys.items()} == {"train": 48, "validation": 12, "test": 12}
    for column in keys.values():
        assert all(column.count(key) == 4 for key in column)
    assert not set(keys["train"]) & set(keys["test"]) | set(keys["validation"]) & set(keys["test"])
    again, _ = read_splits(settings, task)
    assert {name: split["ref"][:] for name, split in again.items()} == {n: s["ref"][:] for n, s in splits.items()}


def test_answers_that_may_exceed_the_models_positions_are_refused_before_the_run(causal_config: Any) -> None:
    task = TASK | {"generate": {"max_new_tokens": 33}}
    with pytest.raises(FedeltaError, match="max_length 32 and task.generate.max_new_tokens 33 are together more than"):
        run(causal_config("gpt2", task=task))


def test_a_models_own_generation_settings_have_no_effect(causal: Any, things: Path) -> None:
    model, tokenizer = model_of(causal("llama"))
    prompts = colors(things, tokenizer).prompts[:4]
    settings = Generation(max_new_tokens=12)
    before = generate(model, tokenizer, prompts, settings)
    for name, value in {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "min_new_tokens": 12}.items():
        setattr(model.peft.get_base_model().generation_config, name, value)
        assert generate(model, tokenizer, prompts, settings) == before, name


@pytest.mark.parametrize("beams", [1, 3])
def test_an_answer_may_repeat_n_grams_of_its_prompt_but_not_its_own(beams: int, causal: Any) -> None:
    model, tokenizer = model_of(causal("llama"))
    prompts = [list(range(3, len(tokenizer)))]
    free = Generation(max_new_tokens=1, beams=beams)
    once = free.model_copy(update={"no_repeat_ngram_size": 1})
    assert generate(model, tokenizer, prompts, once) == generate(model, tokenizer, prompts, free) != [""]
    words = generate(model, tokenizer, prompts, once.model_copy(update={"max_new_tokens": 8}))[0].split()
    assert len(words) == len(set(words)) > 3


def test_partitions_by_class_are_refused_for_tasks_without_classes(causal_config: Any) -> None:
    for kind in ("dirichlet", "two-quality", "pathological", "shards"):
        with pytest.raises(FedeltaError, match=f"partition.kind: {kind} needs classes, but task completion has none"):
            causal_config(partition={"kind": kind, "clients": 3})


@pytest.mark.parametrize(
    "template",
    ["{} {thing}", "{thing:>1000000000}", "{thing!r}", "{thing.__class__}", "{thing[0]}", "{thing:{thing}}", "{0}"],
)
def test_a_template_has_only_names_of_columns_in_its_braces(template: str, causal_config: Any) -> None:
    with pytest.raises(FedeltaError, match=r"task\.prompt: expected only names of columns in braces"):
        causal_config(task=TASK | {"prompt": template})


def test_models_with_dropout_and_checkpointing_are_not_stacked(causal: Any) -> None:
    settings = ModelSettings(name=str(causal("llama")), gradient_checkpointing=True)
    tokenizer = load_tokenizer(settings)
    for dropout, reason in ((0.0, None), (0.3, "other dropout than the forward pass")):
        base = load_base(settings, 0, tokenizer, 0, "completion")
        model = LoraModel(base, LoraSettings(target_modules="all-linear", dropout=dropout))
        assert reason in reason_not_to_stack(model) if reason else reason_not_to_stack(model) is None


def test_the_activations_of_a_language_models_frozen_layers_are_cached(causal: Any, things: Path) -> None:
    model, tokenizer = model_of(causal("llama"), target_modules=r".*layers\.1\..*_proj")
    cache = find_activation_cache(model, tokenizer)
    assert cache
    examples = colors(things, tokenizer)
    plain = evaluate(Completion(**TASK), model, tokenizer, examples, 8)
    cache.fill(examples)
    units = [Unit("forward", rows) for rows in examples.evaluation_order(8)]
    cached = [Completion(**TASK).evaluate_batch(model, tokenizer, examples, unit, cache) for unit in units]
    assert Completion(**TASK).score(examples, units, cached)["loss"] == pytest.approx(plain["loss"], rel=1e-5)
