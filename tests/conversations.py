"""Conversations, and the tokens that are trained in them, written out for the chat templates of well-known families."""

import itertools
from typing import Any

from datasets import Dataset

from fedelta.learning.data import DataSettings
from fedelta.learning.data.examples import IGNORED, Completions
from fedelta.learning.tasks import Conversation

SYSTEM = [{"role": "system", "content": "be kind"}]
ONE = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
TWO = [*ONE, {"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
CHATS = {"one": ONE, "two": TWO, "system, one": [*SYSTEM, *ONE], "system, two": [*SYSTEM, *TWO]}

LLAMA = "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> ⏎ ⏎ Today : ␣26 ␣Jul ␣2024 ⏎ ⏎"
LLAMA_ONE = (
    "<|eot_id|> <|start_header_id|> user <|end_header_id|> ⏎ ⏎ hi <|eot_id|> "
    "<|start_header_id|> assistant <|end_header_id|> ⏎ ⏎ → yo <|eot_id|>"
)
LLAMA_TWO = (
    LLAMA_ONE + " → <|start_header_id|> user <|end_header_id|> ⏎ ⏎ why <|eot_id|> "
    "<|start_header_id|> assistant <|end_header_id|> ⏎ ⏎ → so <|eot_id|>"
)
CHATML_ONE = "<|im_start|> user ⏎ hi <|im_end|> ⏎ <|im_start|> assistant ⏎ → yo <|im_end|>"
CHATML_TWO = CHATML_ONE + " → ⏎ <|im_start|> user ⏎ why <|im_end|> ⏎ <|im_start|> assistant ⏎ → so <|im_end|>"
CHATML_KIND = "<|im_start|> system ⏎ be ␣kind <|im_end|> ⏎ "
CHATML_HELP = "<|im_start|> system ⏎ You ␣help . <|im_end|> ⏎ "
QWEN_ONE = "<|im_start|> user ⏎ hi <|im_end|> ⏎ <|im_start|> assistant ⏎ → <think> ⏎ ⏎ </think> ⏎ ⏎ yo <|im_end|>"
QWEN_SECOND = (
    "<|im_start|> user ⏎ hi <|im_end|> ⏎ <|im_start|> assistant ⏎ yo <|im_end|> ⏎ "
    "<|im_start|> user ⏎ why <|im_end|> ⏎ <|im_start|> assistant ⏎ → <think> ⏎ ⏎ </think> ⏎ ⏎ so <|im_end|>"
)
GEMMA_ONE = "hi <end_of_turn> ⏎ <start_of_turn> model ⏎ → yo <end_of_turn>"
GEMMA_TWO = GEMMA_ONE + " → ⏎ <start_of_turn> user ⏎ why <end_of_turn> ⏎ <start_of_turn> model ⏎ → so <end_of_turn>"
MISTRAL_ONE = "<s> [INST] ␣hi ␣ [/INST] → ␣yo </s>"
PHI_ONE = "<|user|> ⏎ hi <|end|> ⏎ <|assistant|> ⏎ → yo <|end|>"
PHI_TWO = PHI_ONE + " → ⏎ <|user|> ⏎ why <|end|> ⏎ <|assistant|> ⏎ → so <|end|>"
ZEPHYR_ONE = "< | user | > ⏎ hi </s> ⏎ < | assistant | > ⏎ → yo </s>"
ZEPHYR_TWO = ZEPHYR_ONE + " → ⏎ < | user | > ⏎ why </s> ⏎ < | assistant | > ⏎ → so </s>"

# Tokens of each text: an arrow where training begins or ends, ␣ for a space and ⏎ for a line break.
EXPECTED = {
    "llama-3": {
        "one": [f"{LLAMA} {LLAMA_ONE}"],
        "two": [f"{LLAMA} {LLAMA_TWO}"],
        "system, one": [f"{LLAMA} be ␣kind {LLAMA_ONE}"],
        "system, two": [f"{LLAMA} be ␣kind {LLAMA_TWO}"],
    },
    "qwen-2.5": {
        "one": [CHATML_HELP + CHATML_ONE],
        "two": [CHATML_HELP + CHATML_TWO],
        "system, one": [CHATML_KIND + CHATML_ONE],
        "system, two": [CHATML_KIND + CHATML_TWO],
    },
    "qwen-3": {
        "one": [QWEN_ONE],
        "two": [QWEN_ONE, QWEN_SECOND],
        "system, one": [CHATML_KIND + QWEN_ONE],
        "system, two": [CHATML_KIND + QWEN_ONE, CHATML_KIND + QWEN_SECOND],
    },
    "gemma-2": {
        "one": [f"<bos> <start_of_turn> user ⏎ {GEMMA_ONE}"],
        "two": [f"<bos> <start_of_turn> user ⏎ {GEMMA_TWO}"],
    },
    "gemma-3": {
        "one": [f"<bos> <start_of_turn> user ⏎ {GEMMA_ONE}"],
        "two": [f"<bos> <start_of_turn> user ⏎ {GEMMA_TWO}"],
        "system, one": [f"<bos> <start_of_turn> user ⏎ be ␣kind ⏎ ⏎ {GEMMA_ONE}"],
        "system, two": [f"<bos> <start_of_turn> user ⏎ be ␣kind ⏎ ⏎ {GEMMA_TWO}"],
    },
    "mistral": {
        "one": [MISTRAL_ONE],
        "two": [MISTRAL_ONE + " → [INST] ␣why ␣ [/INST] → ␣so </s>"],
        "system, one": ["<s> [INST] ␣be ␣kind ⏎ ⏎ hi ␣ [/INST] → ␣yo </s>"],
        # The template moves the system turn to the last turn of the user.
        "system, two": [
            "<s> [INST] ␣be ␣kind ⏎ ⏎ hi ␣ [/INST] → ␣yo </s>",
            "<s> [INST] ␣hi ␣ [/INST] ␣yo </s> [INST] ␣be ␣kind ⏎ ⏎ why ␣ [/INST] → ␣so </s>",
        ],
    },
    "phi-3": {
        "one": [PHI_ONE],
        "two": [PHI_TWO],
        "system, one": ["<|system|> ⏎ be ␣kind <|end|> ⏎ " + PHI_ONE],
        "system, two": ["<|system|> ⏎ be ␣kind <|end|> ⏎ " + PHI_TWO],
    },
    "smollm2": {
        "one": [CHATML_HELP + CHATML_ONE],
        "two": [CHATML_HELP + CHATML_TWO],
        "system, one": [CHATML_KIND + CHATML_ONE],
        "system, two": [CHATML_KIND + CHATML_TWO],
    },
    "zephyr": {
        "one": [ZEPHYR_ONE],
        "two": [ZEPHYR_TWO],
        "system, one": ["< | system | > ⏎ be ␣kind </s> ⏎ " + ZEPHYR_ONE],
        "system, two": ["< | system | > ⏎ be ␣kind </s> ⏎ " + ZEPHYR_TWO],
    },
    "marked": {
        "one": [CHATML_ONE],
        "two": [CHATML_TWO],
        "system, one": [CHATML_KIND + CHATML_ONE],
        "system, two": [CHATML_KIND + CHATML_TWO],
    },
}
WORDS = [" ", "\n", "cold", " cold", " hi", " you", " there", "a", " b"]
WORDS += sorted(
    {token for chats in EXPECTED.values() for texts in chats.values() for t in texts for token in t.split()}
)
WORDS = [word.replace("␣", " ").replace("⏎", "\n") for word in WORDS if word != "→"]


def examples(tokenizer: Any, rows: list[dict[str, Any]], length: int = 1000, **task: Any) -> Completions:
    """Examples of rows; a row is a conversation if it has no other columns."""
    settings = DataSettings(source="x.jsonl", max_length=length)
    return Conversation(**task).examples(Dataset.from_list(rows), settings, [], tokenizer)


def shown(tokenizer: Any, told: Completions) -> list[str]:
    """Each text as `EXPECTED` has it."""
    texts = []
    for features, labels in zip(told.features, told.labels, strict=True):
        assert all(label in (IGNORED, token) for token, label in zip(features["input_ids"], labels, strict=True))
        parts = []
        for _, run in itertools.groupby(
            zip(features["input_ids"], labels, strict=True), lambda pair: pair[1] != IGNORED
        ):
            tokens = [tokenizer.convert_ids_to_tokens(token) for token, _ in run]
            parts.append(" ".join(token.replace(" ", "␣").replace("\n", "⏎") for token in tokens))
        texts.append(" → ".join(parts))
    return texts
