"""Tokens that are trained in conversations, written out for the chat templates of well-known families."""

import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversations import CHATML_TWO, CHATS, EXPECTED, ONE, QWEN_ONE, QWEN_SECOND, SYSTEM, TWO, WORDS, examples, shown
from families import FAMILIES, byte_tokenizer, word_tokenizer
from fedelta.errors import FedeltaError
from fedelta.learning.data.examples import IGNORED
from fedelta.learning.data.table import DataWarning
from fedelta.learning.tasks.chat_template import ChatTemplate

DATE = "2024-07-26"
CALL = {"type": "function", "function": {"name": "find", "arguments": {"n": 1}}}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"n": {"type": "number"}}}}
CASES = [(family, name) for family, chats in EXPECTED.items() for name in chats]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_trained_tokens_of_a_family_are_those_that_are_written_out(family: str, name: str) -> None:
    tokenizer = word_tokenizer(family, WORDS)
    told = examples(tokenizer, [{"messages": CHATS[name]}])
    assert shown(tokenizer, told) == EXPECTED[family][name]
    assert told.prompts == [told.prompts[-1]] * len(told)
    whole = EXPECTED[family][name][-1]
    prompt = [
        token.replace("␣", " ").replace("⏎", "\n") for token in whole[: whole.rindex("→")].split() if token != "→"
    ]
    assert tokenizer.convert_ids_to_tokens(told.prompts[0]) == prompt
    assert told.references == [CHATS[name][-1]["content"]] * len(told)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_answer_alone_can_be_trained(family: str) -> None:
    tokenizer = word_tokenizer(family, WORDS)
    told = examples(tokenizer, [{"messages": TWO}], train="last")
    (text,) = shown(tokenizer, told)
    expected = EXPECTED[family]["two"][-1]
    context, _, answer = expected.rpartition(" → ")
    assert text == f"{context.replace('→ ', '')} → {answer}"


def test_a_template_without_a_system_role_refuses_the_row_in_one_line() -> None:
    tokenizer = word_tokenizer("gemma-2", WORDS)
    with pytest.raises(FedeltaError, match="row 2: turn 3: .*there is no system role$"):
        examples(tokenizer, [{"messages": ONE}, {"messages": CHATS["system, one"]}])
    with pytest.raises(FedeltaError, match="row 1: turn 2: .*no system role; task.system or the column system adds"):
        examples(tokenizer, [{"messages": ONE}], system="be kind")


def test_a_split_is_said_with_its_reason() -> None:
    rows = [{"messages": ONE}, {"messages": TWO}]
    with pytest.warns(DataWarning, match=r"1 of 2 conversations become 2 texts, because the chat template .* becomes "):
        told = examples(word_tokenizer("qwen-3", WORDS), rows)
    assert list(told.rows) == [0, 1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not examples(word_tokenizer("qwen-2.5", WORDS), rows).rows


def test_answers_after_the_last_question_keep_their_thoughts_and_share_a_text() -> None:
    """Qwen 3 keeps thoughts between calls of tools, so these answers agree; the one before them does not."""
    call = {"role": "assistant", "content": "<think>\na\n</think>\n\nyo"}
    chat = [*ONE, {"role": "user", "content": "why"}, call, {"role": "tool", "content": "cold"}, TWO[-1]]
    tokenizer = word_tokenizer("qwen-3", WORDS)
    context = QWEN_SECOND.partition(" ⏎ <|im_start|> assistant ⏎ →")[0]
    assert shown(tokenizer, examples(tokenizer, [{"messages": chat}])) == [
        QWEN_ONE,
        f"{context} ⏎ <|im_start|> assistant ⏎ → <think> ⏎ a ⏎ </think> ⏎ ⏎ yo <|im_end|> → ⏎ "
        "<|im_start|> <unk> ⏎ cold <|im_end|> ⏎ <|im_start|> assistant ⏎ → "
        "<think> ⏎ ⏎ </think> ⏎ ⏎ so <|im_end|>",
    ]


def test_a_call_of_a_tool_ends_with_its_own_token() -> None:
    """Llama 3 ends a call with another token than an answer."""
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "a", "arguments": {}}}]}
    chat = [ONE[0], call, {"role": "tool", "content": "cold"}, ONE[1]]
    tokenizer = word_tokenizer("llama-3", WORDS)
    (text,) = shown(tokenizer, examples(tokenizer, [{"messages": chat}]))
    parts = text.split(" → ")
    assert parts[1].endswith("<unk> <|eom_id|>")
    assert parts[3] == "yo <|eot_id|>"
    assert len(parts) == 4


def test_marked_parts_are_those_of_transformers() -> None:
    tokenizer = word_tokenizer("marked", WORDS)
    for chat in CHATS.values():
        theirs = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
        told = examples(tokenizer, [{"messages": chat}])
        mask = [int(label != IGNORED) for label in told.labels[0]]
        # The text ends with the end of the last answer, without the line break that follows it.
        assert theirs["input_ids"] == [*told.features[0]["input_ids"], tokenizer.convert_tokens_to_ids("\n")]
        assert theirs["assistant_masks"] == [*mask, 0]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "{%- generation %}\n            {{- turn.content",
            "{{- 'a' }}{%- generation %}{{- turn.content",
            "changes|block",
        ),
        (
            "+ '<|im_end|>' }}\n        {%- endgeneration %}",
            "}}{%- endgeneration %}{{- '<|im_end|>' }}",
            "block is not",
        ),
        ("{%- generation %}", "{%- generation %}{%- generation %}{%- endgeneration %}", "inside each other"),
    ],
)
def test_a_generation_block_that_is_not_the_answer_is_refused(old: str, new: str, reason: str) -> None:
    tokenizer = word_tokenizer("marked", WORDS)
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    with pytest.raises(FedeltaError, match=reason):
        examples(tokenizer, [{"messages": ONE}])


def test_an_answer_outside_of_generation_blocks_is_not_trained() -> None:
    tokenizer = word_tokenizer("marked", WORDS)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "== 'assistant' %}", "== 'assistant' and turn.content != 'yo' %}"
    )
    with pytest.warns(DataWarning, match="1 of 1 conversations have answers that are not trained, because the chat"):
        (text,) = shown(tokenizer, examples(tokenizer, [{"messages": TWO}]))
    assert text == CHATML_TWO.replace("→ yo <|im_end|> →", "yo <|im_end|>")
    with pytest.raises(FedeltaError, match="row 1: .* no generation block for any of the answers"):
        examples(tokenizer, [{"messages": ONE}])


def test_tools_and_calls_are_written_as_the_template_writes_them() -> None:
    tokenizer = byte_tokenizer("qwen-2.5")
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    chat = [ONE[0], call, {"role": "tool", "content": "cold", "name": "find"}, ONE[1]]
    rows = [{"messages": chat, "tools": [TOOL]}, {"messages": ONE, "tools": []}]
    told = examples(tokenizer, rows)
    theirs = tokenizer.apply_chat_template(chat, tools=[TOOL], tokenize=False)
    assert '"parameters": {"n": {"type": "number"}}' in theirs
    assert tokenizer.decode(told.features[0]["input_ids"]) == theirs.removesuffix("\n")
    taught = tokenizer.decode([label for label in told.labels[0] if label != IGNORED])
    assert taught == '<tool_call>\n{"name": "find", "arguments": {"n": 1}}\n</tool_call><|im_end|>yo<|im_end|>'
    assert "find" not in tokenizer.decode(told.features[1]["input_ids"])


@pytest.mark.parametrize(
    ("family", "row", "reason"),
    [
        (
            "phi-3",
            {"messages": [*TWO[:3], {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
            "the tool_calls",
        ),
        ("zephyr", {"messages": ONE, "tools": [TOOL]}, r"the tools \(task.tools: null reads none\)"),
        ("no tools", {"messages": [ONE[0], {"role": "tool", "content": "cold"}, ONE[1]]}, "turn 2, of the role tool"),
        ("no system", {"messages": [*SYSTEM, *ONE]}, "turn 1, of the role system"),
    ],
)
def test_what_a_template_does_not_write_is_refused(family: str, row: dict[str, Any], reason: str) -> None:
    tokenizer = word_tokenizer(family if family in FAMILIES else "zephyr", WORDS)
    if family not in FAMILIES:
        known = "['user', 'assistant', 'system']" if family == "no tools" else "['user', 'assistant']"
        loop = "{% for turn in messages %}"
        tokenizer.chat_template = tokenizer.chat_template.replace(loop, loop[:-2] + f"if turn.role in {known} %}}")
    with pytest.raises(FedeltaError, match=f"row 2: .*the tokenizer's chat template does not write {reason}"):
        examples(tokenizer, [{"messages": ONE, "tools": []}, row])


def test_a_later_system_turn_that_the_template_leaves_out_is_refused() -> None:
    tokenizer = byte_tokenizer("zephyr")
    loop = "{% for turn in messages %}"
    first = "{% for turn in messages if turn.role != 'system' or turn == messages[0] %}"
    tokenizer.chat_template = tokenizer.chat_template.replace(loop, first)
    late = [*SYSTEM, *ONE, {"role": "system", "content": "LATE RULE"}, *TWO[2:]]
    rows = [{"messages": [*SYSTEM, *TWO]}, {"messages": late}]
    with pytest.raises(FedeltaError, match="row 2: turn 6: .* does not write turn 4, of the role system"):
        examples(tokenizer, rows)
    assert len(examples(tokenizer, rows[:1])) == 1


def test_text_beside_calls_that_the_template_leaves_out_is_refused() -> None:
    tokenizer = byte_tokenizer("llama-3")
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    rest = [{"role": "tool", "content": "cold"}, ONE[1]]
    assert len(examples(tokenizer, [{"messages": [ONE[0], call, *rest]}])) == 1
    with pytest.raises(FedeltaError, match="turn 2: .* does not write the content of an answer that has tool_calls"):
        examples(tokenizer, [{"messages": [ONE[0], {**call, "content": "I will look."}, *rest]}])


def test_a_template_that_checks_the_number_of_a_call_or_needs_tools_is_not_confused_by_the_check() -> None:
    tokenizer = byte_tokenizer("qwen-2.5")
    checks = "{%- for turn in messages if turn.tool_call_id and (turn.tool_call_id | length != 9 or not tools) %}"
    checks += "{{ raise_exception('not 9 letters, or no tools') }}{%- endfor %}"
    tokenizer.chat_template = checks + tokenizer.chat_template
    call = {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "123456789"}]}
    chat = [ONE[0], call, {"role": "tool", "content": "cold", "tool_call_id": "123456789"}, ONE[1]]
    assert len(examples(tokenizer, [{"messages": chat, "tools": [TOOL]}])) == 1


def test_thoughts_that_the_template_leaves_out_are_counted_in_one_line() -> None:
    rows = [{"messages": [ONE[0], {**ONE[1], "reasoning_content": "THINK"}]}, {"messages": ONE}]
    with pytest.warns(DataWarning, match="1 of 2 conversations have answers with reasoning_content, which the chat"):
        examples(byte_tokenizer("qwen-2.5"), rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = examples(byte_tokenizer("qwen-3"), rows)
    assert "THINK" in byte_tokenizer("qwen-3").decode(told.features[0]["input_ids"])


def test_special_tokens_that_directly_follow_the_end_are_trained() -> None:
    tokenizer = word_tokenizer("phi-3", WORDS)
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|end|>\\n'", "'<|end|><|user|>'")
    (text,) = shown(tokenizer, examples(tokenizer, [{"messages": ONE}]))
    assert text.endswith("→ yo <|end|> <|user|> <|endoftext|>")


texts = st.text(st.sampled_from("ab: \n.é蓝🙂<>"), min_size=1, max_size=8).filter(str.strip)


@pytest.mark.parametrize("family", FAMILIES)
@given(chat=st.lists(st.tuples(texts, texts), min_size=1, max_size=4), system=st.none() | texts)
def test_each_answer_is_trained_once_as_the_template_renders_it(
    family: str, chat: list[tuple[str, str]], system: str | None
) -> None:
    tokenizer = byte_tokenizer(family)
    messages = [{"role": "system", "content": system}] if system and family != "gemma-2" else []
    for question, answer in chat:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        told = examples(tokenizer, [{"messages": messages}], generate={"max_new_tokens": 1000})
    template = ChatTemplate(tokenizer, DATE)
    expected = {}
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = template.render(messages[:i], True)
            expected[before] = template.render(messages[: i + 1], False)
    found = {}
    for features, labels in zip(told.features, told.labels, strict=True):
        tokens = features["input_ids"]
        begins = [i for i in range(1, len(labels)) if labels[i] != IGNORED and labels[i - 1] == IGNORED]
        for begin in begins:
            end = next((i for i in range(begin, len(labels)) if labels[i] == IGNORED), len(labels))
            found[tokenizer.decode(tokens[:begin])] = tokenizer.decode(tokens[begin:end])
    assert found.keys() == expected.keys(), "each answer is trained once, after the text from which it is generated"
    for before, whole in expected.items():
        after = whole.removeprefix(before + found[before])
        assert after != whole
        assert after in ("", "\n", "\n" + tokenizer.eos_token), "only what follows the end is not trained"
        assert tokenizer(found[before], add_special_tokens=False)["input_ids"][-1] in tokenizer.all_special_ids
    last = template.render(messages[:-1], True)
    assert told.prompts[-1] == tokenizer(last, add_special_tokens=False)["input_ids"]
    assert told.features[-1]["input_ids"][: len(told.prompts[-1])] == told.prompts[-1] or len(chat) > 1
    assert told.references[-1] == messages[-1]["content"].strip()
