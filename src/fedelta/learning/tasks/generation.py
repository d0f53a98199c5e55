"""Answers to prompts: beam search or greedy, several prompts at once."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from fedelta.learning.model.lora_model import LoraModel
from fedelta.settings import Settings


class Generation(Settings):
    """How answers are generated; never by chance.

    Args:
        max_new_tokens: of an answer.
        beams: 1 is greedy.
        length_penalty: of beam search; more favors longer answers.
        no_repeat_ngram_size: n-grams of so many tokens come once in an answer, which may repeat those of its prompt; 0
            lets them repeat.
        batch_size: prompts at once.
        limit: prompts at most, the first ones; None takes all.
    """

    max_new_tokens: int = Field(default=64, ge=1)
    beams: int = Field(default=1, ge=1)
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    batch_size: int = Field(default=16, ge=1)
    limit: int | None = Field(default=None, ge=1)


@torch.no_grad()
def generate(
    model: LoraModel, tokenizer: Any, prompts: Sequence[Sequence[int]], settings: Generation, end: int | None = None
) -> list[str]:
    """The loaded model's answer to each of these prompts, without special tokens.

    Args:
        prompts: tokens, with whatever comes before an answer.
        end: token that ends an answer, beside the one that ends a text.
    """
    from transformers import GenerationConfig

    model.peft.eval()
    longest = max(map(len, prompts))
    # On the left, so that all of them end where the answer begins.
    padded = [[tokenizer.pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.beams,
        length_penalty=settings.length_penalty,
        do_sample=False,
        # What is left out would be taken from the model's own generation_config.
        no_repeat_ngram_size=0,
        repetition_penalty=1.0,
        encoder_repetition_penalty=1.0,
        min_length=0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=_ends(model, tokenizer, end),
    )
    found = model.peft.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=config,
        logits_processor=_never_twice(settings.no_repeat_ngram_size, longest),
    )
    return [text.strip() for text in tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)]


def _never_twice(size: int, begin: int) -> Any:
    """Bans n-grams that an answer has had. Of transformers' own the prompt's would count too, with the names in it."""
    from transformers import LogitsProcessor, LogitsProcessorList, NoRepeatNGramLogitsProcessor

    class InAnswer(LogitsProcessor):
        def __init__(self) -> None:
            self._inner = NoRepeatNGramLogitsProcessor(size)

        def __call__(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return self._inner(tokens[:, begin:], scores)

    return LogitsProcessorList([InAnswer()] if size else [])


def _ends(model: LoraModel, tokenizer: Any, end: int | None) -> list[int]:
    """Tokens that end an answer: a chat model has one for its turn beside that for a text."""
    own = getattr(model.peft, "generation_config", None)
    theirs = getattr(own, "eos_token_id", None) or []
    found = {tokenizer.eos_token_id, end, *([theirs] if isinstance(theirs, int) else theirs)}
    return sorted(found - {None})
