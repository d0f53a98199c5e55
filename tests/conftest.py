"""Small real models and data, built here: nothing comes from a hub."""

import csv
import functools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast

from causal import TASK, build_model, write_rows
from fedelta.config import Config, parse_config

# Many small operations: two threads on two shared cores can be fifty times slower than one.
torch.set_num_threads(1)
settings.register_profile("fedelta", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("fedelta")

TOPICS = {
    "sea": "ship wave tide reef harbour sail coral anchor".split(),
    "sky": "cloud wing star moon comet breeze orbit feather".split(),
    "land": "hill root field stone river forest valley barn".split(),
}
FILLER = "the a of and in on with near under old small grey bright quiet".split()


def _tokenizer(folder: Path, inputs: list[str]) -> int:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = special + FILLER + [word for topic in TOPICS.values() for word in topic]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        model_input_names=inputs,
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    return len(words)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT with a pooler; its query and value layers are square, its dense ones are not."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = _tokenizer(folder, ["input_ids", "token_type_ids", "attention_mask"])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def calm_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without dropout."""
    folder = tmp_path_factory.mktemp("calm-bert")
    shutil.copytree(tiny_bert, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer GPT-2: its layers are Conv1D, stored in×out (`fan_in_fan_out`)."""
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    vocabulary = _tokenizer(folder, ["input_ids", "attention_mask"])
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_embd=24, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3)
    GPT2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 240 short texts about three topics, from several authors."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "texts.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "author"])
        for i in range(240):
            label = list(TOPICS)[i % 3]
            words = rng.choices(FILLER, k=rng.randint(2, 8)) + rng.choices(TOPICS[label], k=2)
            rng.shuffle(words)
            writer.writerow([" ".join(words), label, f"author-{i % 7}"])
    return path


@pytest.fixture
def tiny_config(tiny_bert: Path, texts: Path, tmp_path: Path) -> Any:
    """Makes a configuration that trains in a second or two; keyword arguments replace whole sections."""

    def make(**changes: Any) -> Config:
        data = {
            "name": "tiny",
            "output": str(tmp_path / "runs"),
            "rounds": 3,
            "workers": 1,
            "method": "replication",
            "model": {"name": str(tiny_bert)},
            "lora": {"alpha": 8},
            "ranks": {"allocation": "fixed", "low": 2, "high": 4, "share": 0.5},
            "data": {"source": str(texts), "max_length": 16},
            # Unequal shards: seven authors, of whom one client has a single one.
            "partition": {"kind": "natural", "by": "author", "clients": 4},
            "training": {"steps": 2, "batch_size": 8, "learning_rate": 0.01},
        }
        return parse_config(data | changes)

    return make


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Architecture → folder of a small causal language model; made when it is first asked for."""
    return functools.cache(lambda name: build_model(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of prompts and completions."""
    return write_rows(tmp_path_factory.mktemp("things") / "things.jsonl")


@pytest.fixture
def causal_config(causal: Any, things: Path, tmp_path: Path) -> Any:
    """As `tiny_config`, of a causal language model."""

    def make(architecture: str = "llama", **changes: Any) -> Config:
        data = {
            "name": "causal",
            "output": str(tmp_path / "runs"),
            "rounds": 2,
            "workers": 1,
            "method": "fedex",
            "task": TASK,
            "model": {"name": str(causal(architecture))},
            "lora": {"alpha": 8, "target_modules": "all-linear"},
            "ranks": {"allocation": "fixed", "low": 2, "high": 4, "share": 0.5},
            "data": {"source": str(things), "max_length": 32},
            "partition": {"clients": 4},
            "training": {"batch_size": 8, "learning_rate": 0.02},
        }
        return parse_config(data | changes)

    return make
