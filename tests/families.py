"""Chat templates with the formats of well-known families, and small tokenizers with their special tokens."""

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"


class Family(NamedTuple):
    """Special tokens of a family.

    Args:
        special: tokens besides those that begin and end a text.
        begin: token that a template may put before a text.
        end: token that ends a text.
        plain: added tokens that are not special.
    """

    special: tuple[str, ...]
    begin: str = "<s>"
    end: str = "</s>"
    plain: tuple[str, ...] = ()


_CHATML = Family(("<|im_start|>",), "<|endoftext|>", "<|im_end|>")
FAMILIES = {
    "llama-3": Family(
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"), "<|begin_of_text|>", "<|end_of_text|>"
    ),
    "qwen-2.5": _CHATML,
    "qwen-3": _CHATML._replace(plain=("<think>", "</think>")),
    "gemma-2": Family(("<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
    "gemma-3": Family(("<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
    "mistral": Family(("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")),
    "phi-3": Family(("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<s>", "<|endoftext|>"),
    "smollm2": _CHATML,
    "zephyr": Family(()),
    "marked": _CHATML,
}


def template_of(family: str) -> str:
    return (TEMPLATES / f"{family}.jinja").read_text()


def _finished(tokenizer: Tokenizer, family: str) -> PreTrainedTokenizerFast:
    tokens = FAMILIES[family]
    built = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token=tokens.begin,
        eos_token=tokens.end,
        extra_special_tokens=list(tokens.special),
    )
    built.add_tokens(list(tokens.plain))
    built.chat_template = template_of(family)
    return built


def word_tokenizer(family: str, words: list[str]) -> Any:
    """A tokenizer with a token for each word, with or without a space before it, and for any other character."""
    tokens = FAMILIES[family]
    every = list(dict.fromkeys(["<pad>", "<unk>", tokens.begin, tokens.end, *tokens.special, *words]))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(every)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\s|[^\w\s]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _finished(tokenizer, family)


def byte_tokenizer(family: str) -> Any:
    """A tokenizer with a token for each byte, and one for some pairs that stand where a turn begins or ends."""
    tokens = FAMILIES[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), (":", "Ċ"), ("Ġ", "a"), ("Ċ", "a"), (">", "Ċ")]
    every = ["<pad>", "<unk>", tokens.begin, tokens.end, *tokens.special, *alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(dict.fromkeys(every))}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, family)
