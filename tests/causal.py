"""Small causal language models of common architectures, and texts to complete."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
)

COLORS = {"ship": "red", "star": "white", "hill": "green", "wave": "blue", "barn": "brown", "moon": "grey"}
WORDS = [*COLORS, *COLORS.values(), *"the color of is a an old small . :".split()]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
SHAPE: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=16),
    "gemma2": Gemma2Config(**SHAPE, head_dim=6, sliding_window=16, query_pre_attn_scalar=6),
    "llama-64": LlamaConfig(**SHAPE | {"hidden_size": 64, "intermediate_size": 128}),
    "gpt2": GPT2Config(
        vocab_size=SHAPE["vocab_size"],
        n_embd=24,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
}
TASK: dict[str, Any] = {
    "kind": "completion",
    "prompt": "the color of {article} {thing} is :",
    "completion": " {answer} .",
}


def build_tokenizer(begins: bool = True) -> PreTrainedTokenizerFast:
    """A word tokenizer that puts a token before each text, like Llama's, or does not, like GPT-2's."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def build_model(architecture: str, folder: Path) -> Path:
    """Write a model with random weights and its tokenizer to a folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]).save_pretrained(folder)
    build_tokenizer(begins=architecture != "gpt2").save_pretrained(folder)
    return folder


def write_rows(file: Path, count: int = 150) -> Path:
    """Write a JSONL file of things and their colors."""
    rng = random.Random(0)
    rows = []
    for i in range(count):
        thing = rng.choice(list(COLORS))
        article = rng.choice(["a", "an old", "a small", "an old small"])
        rows.append({"thing": thing, "article": article, "answer": COLORS[thing], "row": i})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
