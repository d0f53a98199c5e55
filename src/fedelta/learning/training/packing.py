"""Packing of several texts into one row of a batch, so that a pass computes less padding.

The texts of an optimizer step fill few rows, none longer than the longest text. Positions start again at each text.
Given neither a mask of padding nor a cache of keys, transformers takes that as the beginning of another text, and masks
the attention between texts. A trial refuses models in which one text would still see another.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fedelta.errors import FedeltaError, one_line
from fedelta.learning.data import Examples
from fedelta.learning.data.examples import IGNORED
from fedelta.learning.model.lora_model import LoraModel

TRIAL_LENGTHS = ((5, 4), (3, 2))
"""Tokens of the texts in each row of the trial. The second row ends in padding."""
MAX_CHANGE, MAX_ROUNDED_CHANGE = 1e-3, 0.2
"""Relative change of a token's logits that can be rounding, in fp32 and in a base of fewer bits. Seeing another text
changes the logits of a trained model by about 1."""
MAX_GROUPED_CHANGE = 1e-2
"""Relative change of logits by the rounding of experts, in any type."""

_REASONS: WeakKeyDictionary[LoraModel, str | None] = WeakKeyDictionary()


def pack(texts: Sequence[int], length: Callable[[int], int]) -> list[list[int]]:
    """Distribute texts to rows, none longer than the longest text: each to the fullest row with space, longest first.

    Args:
        texts: texts of one optimizer step, at least one.
        length: function that returns the number of tokens in a text.

    Returns:
        The texts of each row.

    Example:
        >>> pack([0, 1, 2, 3], [9, 4, 6, 3].__getitem__)
        [[0], [2, 3], [1]]
    """
    order = sorted(texts, key=lambda text: (-length(text), text))
    rows: list[list[int]] = []
    space: list[int] = []
    for text in order:
        fitting = [row for row in range(len(rows)) if space[row] >= length(text)]
        if not fitting:
            fitting = [len(rows)]
            rows.append([])
            space.append(length(order[0]))
        fullest = min(fitting, key=space.__getitem__)
        rows[fullest].append(text)
        space[fullest] -= length(text)
    return rows


def packed_batch(
    examples: Examples, rows: Sequence[Sequence[int]], tokenizer: Any, device: torch.device
) -> dict[str, Any]:
    """Collate packed rows into the inputs of a causal language model.

    Args:
        examples: texts with one label per token.
        rows: texts of each row.
        tokenizer: the model's tokenizer, whose padding token fills the rows.
        device: device of the tensors.
    """
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    width = max(sum(map(examples.length, texts)) for texts in rows)
    for texts in rows:
        padding = width - sum(map(examples.length, texts))
        tokens = [token for text in texts for token in examples.features[text]["input_ids"]]
        # The token before a text belongs to another text, so it does not predict the first token.
        labels = [label for text in texts for label in (IGNORED, *examples.labels[text][1:])]
        # Padding counts as one more text, which sees only itself.
        positions = [position for n in (*map(examples.length, texts), padding) for position in range(n)]
        columns["input_ids"].append(tokens + [tokenizer.pad_token_id] * padding)
        columns["labels"].append(labels + [IGNORED] * padding)
        columns["position_ids"].append(positions)
    return {name: torch.tensor(lists, device=device) for name, lists in columns.items()} | {"use_cache": False}


def check_packing(model: LoraModel, tokenizer: Any) -> None:
    """Raise if packed texts would see each other.

    A trial, once per model, changes the first text of each row, and compares the logits of short texts in packed rows
    with those of each text alone.

    Raises:
        FedeltaError: saying what differed.
    """
    if model not in _REASONS:
        _REASONS[model] = _reason_not_to_pack(model, tokenizer)
    if reason := _REASONS[model]:
        kind = model.peft.config.model_type
        raise FedeltaError(f"training.packing is true, but a {kind} model can't train on packed texts: {reason}")


@torch.no_grad()
def _reason_not_to_pack(model: LoraModel, tokenizer: Any) -> str | None:
    base = model.peft.get_base_model()
    if getattr(base, "_is_stateful", False):
        return "its layers carry a state from one text of a row to the next"
    lengths = [length for row in TRIAL_LENGTHS for length in row]
    # Special tokens are often the first or last ones, and may stand for images.
    half = model.peft.get_input_embeddings().num_embeddings // 2
    exact = model.dtype == torch.float32 and not getattr(base, "is_quantized", False)
    texts = [[half + (5 * text + 3 * place) % half for place in range(n)] for text, n in enumerate(lengths)]
    examples = Examples([{"input_ids": tokens} for tokens in texts], texts)
    training = model.peft.training
    model.peft.eval()
    try:
        batch = packed_batch(examples, [[0, 1], [2, 3]], tokenizer, model.device)
        packed = model.peft(**batch).logits
        if _sees_another(model, batch, packed):
            return "a text's logits depend on the text before it in its row"
        for text, tokens in enumerate(texts):
            row, place = divmod(text, 2)
            begin = lengths[text - 1] if place else 0
            alone = model.peft(input_ids=torch.tensor([tokens], device=model.device)).logits[0]
            change = _change(packed[row, begin : begin + len(tokens)], alone)
            if not change <= (MAX_CHANGE if exact else MAX_ROUNDED_CHANGE):
                return f"the logits of a text change by {change:.0%} when another text is before it in its row"
    except Exception as error:
        # A model may not take positions, or need something else, and raise anything.
        return one_line(error, 120)
    finally:
        model.peft.train(training)
    return None


def _sees_another(model: LoraModel, batch: dict[str, Any], logits: Tensor) -> bool:
    """Tell whether the second text of a row changes with the first.

    Masked scores are exact zeros, so nothing may change, in any type. Experts take tokens in groups, whose sizes change
    with the other tokens, and with them the rounding.
    """
    others = batch["input_ids"].clone()
    for row, (first, _) in enumerate(TRIAL_LENGTHS):
        others[row, :first] -= 1
    changed = model.peft(**{**batch, "input_ids": others}).logits
    grouped = any("experts" in name for name, _ in model.peft.named_modules())
    for row, (first, second) in enumerate(TRIAL_LENGTHS):
        before, after = (x[row, first : first + second] for x in (logits, changed))
        if not (torch.equal(before, after) or (grouped and _change(after, before) <= MAX_GROUPED_CHANGE)):
            return True
    return False


def _change(logits: Tensor, expected: Tensor) -> float:
    """Largest relative change of the logits of a token, up to a constant that does not change probabilities."""
    logits, expected = (x.float() - x.float().mean(-1, keepdim=True) for x in (logits, expected))
    return float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
