"""Small encoders, and texts to classify."""

import csv
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast

TOPICS = {
    "sea": "ship wave tide reef harbour sail coral anchor".split(),
    "sky": "cloud wing star moon comet breeze orbit feather".split(),
    "land": "hill root field stone river forest valley barn".split(),
}
FILLER = "the a of and in on with near under old small grey bright quiet".split()


def _save_tokenizer(folder: Path, inputs: list[str]) -> int:
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


def build_bert(folder: Path) -> Path:
    """Write a two-layer BERT with a pooler. Its query and value layers are square, its dense ones are not."""
    vocabulary = _save_tokenizer(folder, ["input_ids", "token_type_ids", "attention_mask"])
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


def build_gpt2(folder: Path) -> Path:
    """Write a two-layer GPT-2. Its layers are Conv1D, stored in×out (`fan_in_fan_out`)."""
    vocabulary = _save_tokenizer(folder, ["input_ids", "attention_mask"])
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_embd=24, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3)
    GPT2Model(config).save_pretrained(folder)
    return folder


def write_texts(file: Path) -> Path:
    """Write a CSV file of 240 short texts about three topics, by several authors."""
    rng = random.Random(0)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label", "author"])
        for i in range(240):
            label = list(TOPICS)[i % 3]
            words = rng.choices(FILLER, k=rng.randint(2, 8)) + rng.choices(TOPICS[label], k=2)
            rng.shuffle(words)
            writer.writerow([" ".join(words), label, f"author-{i % 7}"])
    return file
