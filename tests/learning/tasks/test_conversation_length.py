"""Conversations that are longer than the configured length lose whole turns."""

import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversations import CHATML_KIND, WORDS, examples, shown
from families import FAMILIES, byte_tokenizer, word_tokenizer
from fedelta.errors import FedeltaError
from fedelta.learning.data.examples import IGNORED
from fedelta.learning.tasks.plain import CutWarning

CHAT = [{"role": "system", "content": "be kind"}] + [
    {"role": role, "content": content}
    for exchange in (("hi", "yo"), ("why", "so"), ("you", "cold"))
    for role, content in zip(("user", "assistant"), exchange, strict=True)
]
FIRST = "<|im_start|> user ⏎ hi <|im_end|> ⏎ <|im_start|> assistant ⏎ → yo <|im_end|>"
SECOND = "⏎ <|im_start|> user ⏎ why <|im_end|> ⏎ <|im_start|> assistant ⏎ → so <|im_end|>"
THIRD = "⏎ <|im_start|> user ⏎ you <|im_end|> ⏎ <|im_start|> assistant ⏎ → cold <|im_end|>"
WHOLE = 7 + 11 + 12 + 12
"""Tokens of the system turn and of each exchange."""


def cut(length: int, chat: list[dict[str, Any]] = CHAT, **task: Any) -> tuple[list[str], list[str], str]:
    """Texts, prompts and warning of a conversation."""
    tokenizer = word_tokenizer("qwen-2.5", [*WORDS, "you"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        told = examples(tokenizer, [{"messages": chat}], length, **task)
    assert all(len(features["input_ids"]) <= length for features in told.features)
    assert all(len(prompt) <= length for prompt in told.prompts)
    prompts = [" ".join(tokenizer.convert_ids_to_tokens(prompt)) for prompt in told.prompts]
    prompts = [prompt.replace("\n", "⏎").replace("be  kind", "be ␣kind") for prompt in prompts]
    return shown(tokenizer, told), prompts, " ".join(str(one.message) for one in caught if one.category is CutWarning)


@pytest.mark.parametrize(
    ("length", "expected", "lost"),
    [
        (WHOLE, f"{CHATML_KIND}{FIRST} → {SECOND} → {THIRD}", False),
        (WHOLE - 1, f"{CHATML_KIND}{FIRST} → {SECOND}", True),
        (WHOLE - 12, f"{CHATML_KIND}{FIRST} → {SECOND}", True),
        (WHOLE - 13, f"{CHATML_KIND}{FIRST}", True),
        (18, f"{CHATML_KIND}{FIRST}", True),
    ],
)
def test_a_long_conversation_loses_whole_turns_at_its_end(length: int, expected: str, lost: bool) -> None:
    texts, _, said = cut(length)
    assert texts == [expected]
    assert said == (
        f"1 of 1 conversations are longer than data.max_length {length}: 1 lose turns at their end" if lost else ""
    )


def test_a_first_answer_that_does_not_fit_is_cut_and_keeps_the_system_turn() -> None:
    question = [CHAT[0], {"role": "user", "content": "hi" + " you" * 40}, CHAT[2]]
    texts, prompts, said = cut(26, question)
    kept = "<|im_end|> ⏎ <|im_start|> assistant ⏎"
    assert texts == [f"{CHATML_KIND}<|im_start|> user ⏎ {'␣you ' * 9}{kept} → yo <|im_end|>"]
    assert prompts == [f"{CHATML_KIND}<|im_start|> user ⏎ {' you ' * 11}{kept}"]
    assert "1 are cut within a turn, because not even one answer fits" in said
    answer = [*CHAT[:2], {"role": "assistant", "content": "yo" + " you" * 40}]
    texts, _, _ = cut(26, answer)
    before = f"{CHATML_KIND}<|im_start|> user ⏎ hi <|im_end|> ⏎ <|im_start|> assistant ⏎"
    assert texts == [f"{before} → yo{' ␣you' * 9}"]


def test_the_last_answer_alone_loses_turns_after_the_system_turn() -> None:
    texts, _, said = cut(WHOLE, train="last")
    assert texts == [f"{CHATML_KIND}{FIRST} {SECOND} {THIRD}".replace("→ yo", "yo").replace("→ so", "so")]
    assert said == ""
    for length in (WHOLE - 1, WHOLE - 12):
        texts, _, said = cut(length, train="last")
        assert texts == [f"{CHATML_KIND}{SECOND[2:]} {THIRD}".replace("→ so", "so")]
        assert said.endswith("1 lose turns after their system turn")
    texts, _, _ = cut(WHOLE - 13, train="last")
    assert texts == [f"{CHATML_KIND}{THIRD[2:]}"]


@pytest.mark.parametrize(
    ("length", "kept"),
    [
        (WHOLE - 2, f"{CHATML_KIND}{FIRST} {SECOND} {THIRD}"),
        (WHOLE - 3, f"{CHATML_KIND}{SECOND[2:]} {THIRD}"),
        (WHOLE - 14, f"{CHATML_KIND}{SECOND[2:]} {THIRD}"),
        (WHOLE - 15, f"{CHATML_KIND}{THIRD[2:]}"),
    ],
)
def test_a_prompt_loses_whole_turns_after_the_system_turn(length: int, kept: str) -> None:
    _, (prompt, *others), _ = cut(length)
    assert not others
    assert prompt == kept.rpartition(" → ")[0].replace("→ ", "")


def test_a_length_that_has_no_space_after_the_system_turn_is_refused() -> None:
    with pytest.raises(FedeltaError, match="row 1: data.max_length 11 leaves no space after the 10 tokens before each"):
        cut(11)


def test_a_generated_answer_that_may_not_fit_is_said() -> None:
    _, _, said = cut(WHOLE, generate={"max_new_tokens": 1})
    assert said == "1 of 1 last answers are longer than task.generate.max_new_tokens 1"


contents = st.text(st.sampled_from("ab \n"), min_size=1, max_size=12).filter(str.strip)


@pytest.mark.parametrize("family", FAMILIES)
@given(
    st.lists(st.tuples(contents, contents), min_size=1, max_size=4),
    st.integers(8, 250),
    st.sampled_from(["all", "last"]),
)
def test_a_text_of_any_length_has_whole_answers_unless_it_says_so(
    family: str, pairs: list[tuple[str, str]], length: int, train: str
) -> None:
    tokenizer = byte_tokenizer(family)
    chat = [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            told = examples(tokenizer, [{"messages": chat}], length, train=train)
        except FedeltaError as error:
            if "leaves no space" in str(error):
                return
            raise
    said = " ".join(str(one.message) for one in caught)
    answers = 0
    for features, labels, prompt in zip(told.features, told.labels, told.prompts, strict=True):
        assert len(labels) == len(features["input_ids"]) <= length
        assert len(prompt) <= length
        assert labels[0] == IGNORED
        ends = [i for i, label in enumerate(labels) if label != IGNORED and [*labels, IGNORED][i + 1] == IGNORED]
        answers += len(ends)
        whole = all(features["input_ids"][i] in tokenizer.all_special_ids for i in ends)
        assert ends
        assert whole or "cut within a turn" in said
    expected = 1 if train == "last" else len(pairs)
    assert answers == expected or (answers < expected and "lose turns at their end" in said)
