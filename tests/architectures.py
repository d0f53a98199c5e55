"""Small models of many architectures with random weights, to complete or classify texts."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    T5Config,
)

from causal import ARCHITECTURES, SHAPE, build_tokenizer

SMALL: dict[str, Any] = SHAPE | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
ENCODER: dict[str, Any] = {
    "vocab_size": SHAPE["vocab_size"],
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODERS: dict[str, Any] = {
    "llama": ARCHITECTURES["llama"],
    "gpt2": ARCHITECTURES["gpt2"],
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gemma3-text": Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=16),
    "gemma3": Gemma3Config(
        text_config={**SMALL, "head_dim": 8, "sliding_window": 16},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    ),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": Qwen3MoeConfig(**SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
    "opt": OPTConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        dropout=0.0,
        init_std=0.2,
        **SPECIAL_IDS,
    ),
}
CLASSIFIERS: dict[str, Any] = {
    "bert": BertConfig(**ENCODER),
    "roberta": RobertaConfig(**ENCODER | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}),
    "bart": BartConfig(
        vocab_size=SHAPE["vocab_size"],
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        init_std=0.2,
        **SPECIAL_IDS,
        decoder_start_token_id=2,
    ),
    "t5": T5Config(
        vocab_size=SHAPE["vocab_size"],
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    ),
}


def build(name: str, folder: Path) -> Path:
    """Write a model of an architecture with its tokenizer, and return the folder."""
    torch.manual_seed(0)
    if name == "gemma3":
        model: Any = Gemma3ForConditionalGeneration(DECODERS[name])
    elif name in DECODERS:
        model = AutoModelForCausalLM.from_config(DECODERS[name])
    else:
        model = AutoModel.from_config(CLASSIFIERS[name])
    model.save_pretrained(folder)
    tokenizer = build_tokenizer(begins=name != "gpt2")
    if name in CLASSIFIERS:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    tokenizer.save_pretrained(folder)
    return folder
