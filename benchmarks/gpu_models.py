"""Models of well-known shapes with random weights, built from configurations, and texts of random tokens for them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from simulation import padder
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    RobertaConfig,
)

from fedelta.learning.data import Examples
from fedelta.learning.data.examples import Completions
from fedelta.learning.model.checkpointing import enable_checkpointing
from fedelta.learning.model.class_token import read_class_token_alone
from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.lora.adapter import Adapter, LoraPair

CLASSES = 4


def decoder(hidden: int, layers: int, heads: int, groups: int, wide: int, words: int, **more: Any) -> dict[str, Any]:
    """Configuration keys that Llama, Mistral and Gemma share."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": wide,
        "vocab_size": words,
        "max_position_embeddings": 4096,
        **more,
    }


def encoder(hidden: int, layers: int, heads: int, wide: int, words: int, **more: Any) -> dict[str, Any]:
    """Configuration keys that BERT and similar encoders share."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": wide,
        "vocab_size": words,
        **more,
    }


SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Llama-3.2-1B": (LlamaConfig, decoder(2048, 16, 32, 8, 8192, 128256, head_dim=64, tie_word_embeddings=True)),
    "Llama-3.2-3B": (LlamaConfig, decoder(3072, 28, 24, 8, 8192, 128256, head_dim=128, tie_word_embeddings=True)),
    "Mistral-7B": (MistralConfig, decoder(4096, 32, 32, 8, 14336, 32000, sliding_window=4096)),
    "Gemma-2-9B": (Gemma2Config, decoder(3584, 42, 16, 8, 14336, 256000, head_dim=256, query_pre_attn_scalar=256)),
    "GPT-2": (GPT2Config, {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}),
    "MiniLM": (BertConfig, encoder(384, 6, 12, 1536, 30522)),
    "DistilBERT": (DistilBertConfig, {"dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072}),
    "ALBERT-base": (AlbertConfig, encoder(768, 12, 12, 3072, 30000, embedding_size=128)),
    "RoBERTa-base": (RobertaConfig, encoder(768, 12, 12, 3072, 50265, max_position_embeddings=514, pad_token_id=1)),
    "RoBERTa-large": (RobertaConfig, encoder(1024, 24, 16, 4096, 50265, max_position_embeddings=514, pad_token_id=1)),
}
CAUSAL = ("Llama-3.2-1B", "Llama-3.2-3B", "Mistral-7B", "Gemma-2-9B", "GPT-2")

TOY_DECODER = decoder(32, 2, 4, 2, 64, 128, head_dim=8)
TOY_ENCODER = encoder(24, 2, 2, 48, 128)
TOYS: dict[Any, dict[str, Any]] = {
    LlamaConfig: TOY_DECODER,
    MistralConfig: TOY_DECODER,
    Gemma2Config: TOY_DECODER | {"query_pre_attn_scalar": 8},
    GPT2Config: {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2},
    BertConfig: TOY_ENCODER,
    DistilBertConfig: {"dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "vocab_size": 128},
    AlbertConfig: TOY_ENCODER | {"embedding_size": 16},
    RobertaConfig: TOY_ENCODER,
}


def lora_model(
    shape: str,
    settings: LoraSettings,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
    toy: bool = False,
) -> LoraModel:
    """Make a model of this shape with LoRA on the device. An encoder has a head that reads only the class token."""
    kind, keys = SHAPES[shape]
    config = kind(**keys | (TOYS[kind] if toy else {}), num_labels=CLASSES)
    if shape in CAUSAL:
        config.pad_token_id = 0
    auto_class = AutoModelForCausalLM if shape in CAUSAL else AutoModelForSequenceClassification
    torch.manual_seed(0)
    with torch.device(device):
        base = auto_class.from_config(config, dtype=dtype)
    base.to(device)
    if checkpointing:
        enable_checkpointing(base)
    if shape not in CAUSAL:
        read_class_token_alone(base)
    return LoraModel(base, settings)


def random_adapter(model: LoraModel, rank: int, seed: int) -> Adapter:
    """Draw an adapter whose B is not zero, as after a round."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    return Adapter(
        {name: LoraPair(normal(rank, n) / n**0.5, 0.01 * normal(m, rank)) for name, (m, n) in model.shapes.items()}
    )


def texts(lengths: Sequence[int], words: int, causal: bool, seed: int = 0) -> Examples:
    """Draw random tokens of these lengths. A causal model predicts all of them, an encoder predicts a class."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, words, length).tolist() for length in lengths]
    features = [{"input_ids": row} for row in rows]
    if not causal:
        return Examples(features, rng.integers(0, CLASSES, len(rows)).tolist())
    prompts, answers = [row[:1] for row in rows], [str(i) for i in range(len(rows))]
    return Completions(features, rows, prompts, answers, answers)


def around(mean: int, longest: int, count: int, seed: int = 0) -> list[int]:
    """Draw lengths between 0.5 and 1.5 times the mean, limited to `longest`."""
    rng = np.random.default_rng(seed)
    return [int(length) for length in (rng.uniform(0.5, 1.5, count) * mean).clip(2, longest)]


def words_of(model: LoraModel) -> int:
    """Size of the model's vocabulary."""
    return int(model.peft.config.vocab_size)


def tokenizer() -> Any:
    """Make a tokenizer that serves only for padding, on the right."""
    return padder()
