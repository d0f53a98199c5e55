"""Runs that train a small model on conversations, and the rows of a site."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import fedelta
from causal import COLORS, SHAPE
from families import word_tokenizer
from fedelta.errors import FedeltaError
from fedelta.flower.agreement import shared_settings
from fedelta.learning.data import DataSettings, PartitionSettings
from fedelta.learning.data.examples import IGNORED
from fedelta.learning.model.base_model import ModelSettings, load_base
from fedelta.learning.shards import build_data, build_shard, read_splits, tokenize_splits
from fedelta.learning.tasks import Completion, Conversation
from fedelta.runs.config import parse_config
from fedelta.runs.identity import identify

THINGS = list(COLORS)
WORDS = ["\n", " ", ".", ":", *("system", "user", "assistant", "model", "You", " help", "north", "south", "and")]
WORDS += [*COLORS, *COLORS.values(), *(f" {color}" for color in COLORS.values())]


def talk(rng: random.Random, turns: int) -> list[dict[str, str]]:
    """A conversation about the colors of things."""
    things = [rng.choice(THINGS) for _ in range(turns)]
    pairs = ([{"role": "user", "content": t}, {"role": "assistant", "content": COLORS[t]}] for t in things)
    return [message for pair in pairs for message in pair]


def write_conversations(file: Path, count: int = 60) -> Path:
    rng = random.Random(0)
    rows = [
        {"messages": talk(rng, 1 + i % 3), "site": ("north", "south")[i % 2], "first": THINGS[i % 2]}
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def build(family: str, folder: Path) -> Path:
    tokenizer = word_tokenizer(family, WORDS)
    torch.manual_seed(0)
    shape = SHAPE | {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 128}
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**shape | tokens | {"vocab_size": len(tokenizer)})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def configuration(family: str, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "output": str(tmp_path / "runs"),
        "rounds": 7,
        "workers": 1,
        "method": "fedex",
        "task": {"kind": "conversation", "generate": {"max_new_tokens": 8}, "answer": "text", "metric": "exact"},
        "model": {"name": str(build(family, tmp_path / "model"))},
        "lora": {"alpha": 16, "target_modules": "all-linear"},
        "ranks": {"allocation": "fixed", "low": 8, "high": 8},
        "data": {"source": str(write_conversations(tmp_path / "talks.jsonl")), "max_length": 100},
        "partition": {"kind": "natural", "by": "site"},
        "training": {"epochs": 5, "batch_size": 16, "learning_rate": 0.005},
    }
    return data | changes


@pytest.mark.parametrize("family", ["qwen-3", "qwen-2.5"])
def test_two_clients_teach_a_model_to_answer_in_conversations(family: str, tmp_path: Path) -> None:
    run = fedelta.run(configuration(family, tmp_path))
    assert set(run.result["clients"]) == {"north", "south"}
    assert run.test["exact"] > 0.9
    assert run.test["loss"] < 0.3
    assert run.rounds["train_loss"].iloc[-1] < run.rounds["train_loss"].iloc[0] / 2
    card = (run.adapter / "README.md").read_text()
    assert "AutoPeftModelForCausalLM" in card
    assert "text-generation" in card
    merged = tmp_path / "merged"
    fedelta.export(tmp_path / "runs" / "run", merged=merged)
    assert "LlamaForCausalLM" in (merged / "config.json").read_text()


def test_the_final_model_of_conversations_is_scored_by_the_harness(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"thing": thing, "color": color}) + "\n" for thing, color in COLORS.items()))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tints.yaml").write_text(
        "task: tints\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        'test_split: test\noutput_type: generate_until\ndoc_to_text: "{{thing}}"\ndoc_to_target: "{{color}}"\n'
        'generation_kwargs: {until: ["<|im_end|>"], max_gen_toks: 3, do_sample: false}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    harness = {"tasks": ["tints"], "include": str(tmp_path / "tasks")}
    run = fedelta.run(configuration("smollm2", tmp_path), task="conversation", evaluation={"harness": harness})
    assert run.test["tints/exact_match"] > 0.8
    with pytest.raises(FedeltaError, match="expected task: completion or conversation, found regression"):
        parse_config({"task": "regression", "evaluation": {"harness": harness}})


def tokenized(file: Path, family: str) -> tuple[DataSettings, Conversation, Any]:
    return (
        DataSettings(source=str(file), client_validation=0.25),
        Conversation(group="first"),
        word_tokenizer(family, WORDS),
    )


def test_the_texts_of_a_row_stay_together(tmp_path: Path) -> None:
    """Qwen 3 writes a conversation of three answers as three texts."""
    settings, task, tokenizer = tokenized(write_conversations(tmp_path / "x.jsonl"), "qwen-3")
    splits, classes = read_splits(settings, task.model_copy(update={"group": None}))
    whole = tokenize_splits(settings, task, splits, classes, tokenizer)
    rows = splits["train"].num_rows
    answers = [sum(m["role"] == "assistant" for m in messages) for messages in splits["train"]["messages"][:]]
    assert len(whole.train) == sum(answers) > rows
    data = build_data(whole, settings, PartitionSettings(clients=3), seed=0)
    parts = [set(part.rows) for shard in data.shards.values() for part in (shard.train, shard.validation)]
    assert len(parts) == 6
    assert all(parts)
    assert set().union(*parts) == set(range(rows))
    assert sum(map(len, parts)) == rows, "no row is in two parts"
    for shard in data.shards.values():
        for part in (shard.train, shard.validation):
            assert len(part) == sum(answers[row] for row in set(part.rows)), "all texts of a row are in its part"
            assert len(part.prompts) == len(part.references) == len(part.groups) == len(part)
    first = data.validation.by_group
    assert len(first) == 2, "one group for each value of the column"
    assert sum(map(len, first)) == splits["validation"].num_rows, "each conversation is one reference"


def test_a_conversation_of_several_texts_counts_as_one_row(tmp_path: Path) -> None:
    """Qwen 3 writes the conversations as more texts than Qwen 2.5."""
    shares = []
    for family in ("qwen-3", "qwen-2.5"):
        config = configuration(family, tmp_path / family, rounds=1, task="conversation")
        config["data"] = {"source": str(write_conversations(tmp_path / "talks.jsonl")), "client_validation": 0}
        splits, _ = read_splits(parse_config(config).data, Conversation())
        sites = splits["train"]["site"][:]
        run = fedelta.run(config)
        assert run.result["clients"] == {site: sites.count(site) for site in ("north", "south")}
        shares.append(run.records[0]["shares"])
        assert shares[-1]["north"] == pytest.approx(sites.count("north") / len(sites))
    assert shares[0] == shares[1]


@pytest.mark.parametrize("kind", ["conversation", "completion"])
def test_a_refused_row_is_named_by_its_file_and_line_after_the_draws(kind: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = [{"prompt": f"say {name} {i}", "completion": "yo", "system": ""} for i in range(40)]
        rows[25] |= {"prompt": "odd"} if name == "b" else {}
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = word_tokenizer("qwen-2.5", WORDS)
    refuses = "{%- if messages[-1].content == 'odd' %}{{ raise_exception('odd prompt') }}{%- endif %}"
    tokenizer.chat_template = refuses + tokenizer.chat_template
    settings = DataSettings(source=str(tmp_path / "*.jsonl"), split_seed=3)
    task = Conversation() if kind == "conversation" else Completion()
    splits, classes = read_splits(settings, task)
    with pytest.raises(FedeltaError, match=r"b\.jsonl, line 26 of (train|test|validation): .*odd prompt"):
        tokenize_splits(settings, task, splits, classes, tokenizer)
    with pytest.raises(FedeltaError, match=r"b\.jsonl, line 26 of train: .*odd prompt"):
        build_shard(settings, task, [], tokenizer, "north", seed=0)


@pytest.mark.parametrize("kind", ["conversation", "completion"])
def test_a_template_of_the_task_replaces_that_of_the_tokenizer_everywhere(kind: str, tmp_path: Path) -> None:
    template = word_tokenizer("qwen-2.5", WORDS).chat_template.replace("'You help.'", "'north'")
    assert "'north'" in template
    file = tmp_path / "own.jinja"
    file.write_text(template)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": t, "completion": COLORS[t]}) + "\n" for t in THINGS * 5))
    task = {"kind": kind, "generate": {"max_new_tokens": 3}}
    config = configuration("qwen-2.5", tmp_path, rounds=1, task=task, partition={"clients": 2})
    config |= {"data": {"source": str(rows), "max_length": 100}}
    model = tmp_path / "model"
    (model / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(model).chat_template is None
    if kind == "conversation":
        with pytest.raises(FedeltaError, match="no chat template, which task: conversation needs; task.chat_template"):
            fedelta.run(config)
    run = fedelta.run(config, **{"task.chat_template": str(file), "output": str(tmp_path / "with")})
    # Everything after the begin of the run is independent of the file.
    file.unlink()
    assert all(re.search("system\\s*north.*user", prompt, re.DOTALL) for prompt in run.generations["prompt"])
    assert AutoTokenizer.from_pretrained(run.adapter).chat_template == template
    folder = tmp_path / "with" / "run"
    assert len(fedelta.generate(folder, ["ship"], max_new_tokens=2)) == 1
    assert len(fedelta.generate(run.adapter, ["ship"], max_new_tokens=2)) == 1
    fedelta.export(folder, merged=tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == template
    own, other = (parse_config(config | {"task": task | {"chat_template": text}}) for text in (template, "{{ 1 }}"))
    assert identify(own)["chat template"] == run.result["inputs"]["chat template"]
    assert identify(own)["chat template"] != identify(other)["chat template"]
    assert shared_settings(own)["task.chat_template"] == template, "sites agree on the text, not on a file's name"


def test_the_adapter_of_a_client_is_used_with_the_template_of_the_task(tmp_path: Path) -> None:
    template = word_tokenizer("qwen-2.5", WORDS).chat_template
    task = {"kind": "conversation", "chat_template": template}
    config = configuration("qwen-2.5", tmp_path, rounds=1, method="fedsa", task=task)
    (tmp_path / "model" / "chat_template.jinja").unlink()
    fedelta.run(config)
    answers = fedelta.generate(tmp_path / "runs" / "run", ["ship"], max_new_tokens=2, client="north")
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("content", "task", "reason"),
    [
        (None, "conversation", "own.jinja: No such file or directory, expected a file with a Jinja template"),
        ("hello", "conversation", "own.jinja: expected a Jinja template of at most"),
        ("{{ messages }}", "completion", "chat: false uses no chat template"),
    ],
)
def test_a_template_that_is_not_one_is_refused(content: str | None, task: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    if content is not None:
        file.write_text(content)
    own = {"kind": task, "chat_template": str(file)} | ({"chat": False} if task == "completion" else {})
    with pytest.raises(FedeltaError, match=reason):
        parse_config({"task": own})


def test_a_site_reads_its_conversations(tmp_path: Path) -> None:
    settings, task, tokenizer = tokenized(write_conversations(tmp_path / "x.jsonl", 20), "qwen-3")
    shard = build_shard(settings, task, [], tokenizer, "north", seed=0)
    assert len(set(shard.train.rows)) == shard.train.row_count == 15 < len(shard.train)
    assert len(set(shard.validation.rows)) == 5
    assert set(shard.train.rows).isdisjoint(shard.validation.rows)
    colors = {f"<think>\n\n</think>\n\n{color}<|im_end|>" for color in COLORS.values()}
    taught = {tokenizer.decode([label for label in labels if label != IGNORED]) for labels in shard.train.labels}
    assert taught <= colors


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    settings, task, tokenizer = tokenized(write_conversations(tmp_path / "x.jsonl", 20), "qwen-3")
    tokenizer.chat_template = None
    with pytest.raises(
        FedeltaError, match="has no chat template, which task: conversation needs; task.chat_template names"
    ):
        build_shard(settings, task, [], tokenizer, "north", seed=0)


def test_the_model_of_a_conversation_is_a_causal_language_model(tmp_path: Path) -> None:
    model = ModelSettings(name=str(build("smollm2", tmp_path / "model")))
    base = load_base(model, 0, word_tokenizer("smollm2", WORDS), 0, Conversation.model_kind)
    assert type(base).__name__ == "LlamaForCausalLM"
    assert base.generation_config.eos_token_id is not None
