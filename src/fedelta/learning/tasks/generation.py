"""Generation of answers to batches of prompts, by beam search or greedily."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from fedelta.learning.model.lora_model import LoraModel
from fedelta.settings import Settings


class Generation(Settings):
    """Settings of generation, which never samples.

    Args:
        max_new_tokens: maximum number of tokens in an answer.
        beams: number of beams. 1 is greedy decoding.
        length_penalty: length penalty of beam search. Larger values favor longer answers.
        no_repeat_ngram_size: n for which no n-gram occurs twice in an answer, although n-grams of the prompt may occur
            again. 0 allows repetition.
        batch_size: number of prompts per batch.
        limit: maximum number of prompts; the first ones are used. None uses all.
    """

    max_new_tokens: int = Field(default=64, ge=1, le=1_000_000)
    beams: int = Field(default=1, ge=1, le=1000)
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    batch_size: int = Field(default=16, ge=1)
    limit: int | None = Field(default=None, ge=1)


@torch.no_grad()
def generate(
    model: LoraModel, tokenizer: Any, prompts: Sequence[Sequence[int]], settings: Generation, end: int | None = None
) -> list[str]:
    """Generate the loaded model's answer to each prompt, without special tokens.

    Args:
        prompts: tokens of each prompt, with everything that comes before an answer.
        end: token that ends an answer, in addition to the one that ends a text.
    """
    from transformers import GenerationConfig

    model.peft.eval()
    inputs = padded_prompts(prompts, tokenizer.pad_token_id, model.device)
    longest = inputs["input_ids"].shape[1]
    base = model.peft.get_base_model()
    own = base.generation_config
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.beams,
        length_penalty=settings.length_penalty,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_tokens(own, tokenizer, end) or None,
    )
    # transformers fills what a configuration leaves open from the model's own.
    base.generation_config = config
    try:
        generated = model.peft.generate(
            **inputs,
            generation_config=config,
            logits_processor=_no_repeated_ngrams(settings.no_repeat_ngram_size, longest),
        )
    finally:
        base.generation_config = own
    return [text.strip() for text in tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)]


def padded_prompts(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Prompts as inputs of a model, padded on the left, so that all of them end where the answer begins."""
    longest = max(map(len, prompts))
    padded = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(padded, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def end_tokens(own: Any, tokenizer: Any, end: int | None) -> list[int]:
    """Tokens that end an answer: those of the model's own generation configuration, the tokenizer's, and `end`."""
    own_ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    return sorted({tokenizer.eos_token_id, end, *own_ends} - {None})


def _no_repeated_ngrams(size: int, begin: int) -> Any:
    """Processor that bans n-grams already in the answer, which starts at position `begin`.

    The processor of transformers alone would also ban the n-grams of the prompt, and with them the names in it.
    """
    from transformers import LogitsProcessor, LogitsProcessorList, NoRepeatNGramLogitsProcessor

    class InAnswer(LogitsProcessor):
        def __init__(self) -> None:
            self._inner = NoRepeatNGramLogitsProcessor(size)

        def __call__(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return self._inner(tokens[:, begin:], scores)

    return LogitsProcessorList([InAnswer()] if size else [])
