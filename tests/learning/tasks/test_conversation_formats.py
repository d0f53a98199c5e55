"""Conversations in the formats in which data sets have them."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset

from conversations import WORDS, examples
from families import byte_tokenizer, word_tokenizer
from fedelta.errors import FedeltaError
from fedelta.learning.data import DataSettings
from fedelta.learning.data.in_memory import remember_data
from fedelta.learning.data.table import DataWarning
from fedelta.learning.shards import read_splits
from fedelta.learning.tasks import Conversation
from fedelta.learning.tasks.chat_rows import Chat, find_format

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
CALL = {"type": "function", "function": {"name": "find", "arguments": {"n": 1, "unit": "km"}}}
TOOL = {
    "type": "function",
    "function": {"name": "find", "parameters": {"type": "object", "properties": {"n": {"type": "number"}}}},
}


def settings(source: Any) -> DataSettings:
    return DataSettings(source=str(source), test=0.25, validation=0.25)


def rows_of(source: Any, task: Conversation) -> list[Any]:
    """All rows of a source, in one order."""
    splits, _ = read_splits(settings(source), task)
    return sorted((row for split in splits.values() for row in split), key=str)


def chats(source: Any, **task: Any) -> list[Chat]:
    """The conversations of a source in some order."""
    own = Conversation(**task)
    rows = rows_of(source, own)
    form = find_format(list(rows[0]), own.format, own.messages, own.system, own.tools)
    return [form.read(row) for row in rows]


def chat(row: dict[str, Any], **task: Any) -> Chat:
    """The conversation of a row that stands in a source by itself, some times."""
    return chats(remember_data([row] * 8), **task)[0]


def refusal(row: dict[str, Any], **task: Any) -> str:
    with pytest.raises(FedeltaError) as refused:
        chats(remember_data([row] * 8), **task)
    line = str(refused.value)
    assert len(line) < 300
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"messages": HI}, {}),
        ({"messages": HI}, {"format": "messages"}),
        ({"conversations": HI}, {}),
        ({"chat": HI}, {"messages": "chat"}),
        ({"messages": HI, "prompt": "hi", "prompt_id": "7"}, {}),
        ({"messages": HI, "conversations": SHAREGPT}, {"messages": "conversations"}),
        ({"messages": json.dumps(HI)}, {}),
        ({"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in HI]}, {}),
        ({"conversations": SHAREGPT}, {}),
        ({"conversations": SHAREGPT}, {"format": "sharegpt"}),
        ({"messages": SHAREGPT}, {}),
        ({"conversations": [{**m, "weight": None} for m in SHAREGPT]}, {}),
        ({"instruction": "hi", "output": "yo"}, {}),
        ({"instruction": "hi", "input": "", "output": "yo"}, {"format": "alpaca"}),
        ({"instruction": "hi", "input": None, "output": "yo", "text": "### hi"}, {}),
        ({"prompt": "hi", "completion": "yo"}, {}),
        ({"prompt": HI[:1], "completion": HI[1:]}, {}),
        ({"prompt": json.dumps(HI[:1]), "completion": json.dumps(HI[1:])}, {"format": "prompt-completion"}),
    ],
)
def test_a_format_is_found_from_the_columns(row: dict[str, Any], task: dict[str, Any]) -> None:
    read = chat(row, **task)
    assert read.messages == HI
    assert read.answers == [1]
    assert read.tools is None


def test_the_input_of_alpaca_follows_its_instruction_and_a_column_system_is_its_system_turn() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be short."}
    assert chat(row).messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Add.\n1 2"},
        {"role": "assistant", "content": "3"},
    ]
    assert chat({**row, "instruction": None}).messages[1]["content"] == "1 2"


def test_a_completion_that_happens_to_be_json_of_messages_is_a_text_among_texts() -> None:
    shown = '[{"role": "assistant", "content": "hi"}]'
    rows = [{"prompt": "a", "completion": shown}, {"prompt": "b", "completion": "yo"}]
    rows.append({"prompt": "c", "completion": '[{"role": "admin"}]'})
    tokenizer = byte_tokenizer("qwen-2.5")
    with pytest.warns(DataWarning, match="1 of 3 cells of completion are JSON of messages; all are read as texts"):
        told = examples(tokenizer, rows)
    assert told.references == [shown, "yo", '[{"role": "admin"}]']
    assert chat(rows[2]).messages[1]["content"] == rows[2]["completion"]
    with pytest.warns(DataWarning, match="all cells of completion are JSON of messages, and are read as messages"):
        assert examples(tokenizer, rows[:1]).references == ["hi"]


def test_a_column_system_that_is_used_is_said_once() -> None:
    rows = [{"messages": HI, "system": "linux"}]
    with pytest.warns(DataWarning, match='the column system is the system turn of each conversation; task.system: ""'):
        examples(word_tokenizer("qwen-2.5", WORDS), rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        examples(word_tokenizer("qwen-2.5", WORDS), rows, system="")


def test_a_wrong_column_in_the_system_turn_names_the_key_and_the_nearest_column() -> None:
    line = refusal({"messages": HI, "ward": "A"}, system="You {wart}")
    assert re.search("task.system: no column 'wart', found messages, ward.*did you mean.*ward", line), line


@pytest.mark.parametrize("write", [list, json.dumps])
def test_the_history_of_alpaca_comes_before_its_instruction(write: Any) -> None:
    history = write([["hi", "yo"], ["why", "so"]])
    read = chat({"instruction": "Add.", "output": "3", "history": history})
    assert [m["content"] for m in read.messages] == ["hi", "yo", "why", "so", "Add.", "3"]
    assert read.answers == [1, 3, 5]
    for none in (None, [], ""):
        assert len(chat({"instruction": "Add.", "output": "3", "history": none}).messages) == 2
    assert "history is [['hi']], expected" in refusal({"instruction": "Add.", "output": "3", "history": [["hi"]]})


def test_nulls_in_the_arguments_of_json_text_are_kept() -> None:
    arguments = {"n": None, "unit": "km"}
    function = {"name": "find", "arguments": arguments, "strict": None}
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "id": None, "function": function}],
    }
    expected = [{"type": "function", "function": {"name": "find", "arguments": arguments}}]
    assert chat({"messages": json.dumps([HI[0], call])}).messages[1] == {"role": "assistant", "tool_calls": expected}
    # Arrow can't hold the second conversation beside the first, so that both are kept as JSON.
    other = {"tool_calls": [{"function": {"name": "find", "arguments": {"n": {"a": 1}, "unit": 7}}}]}
    rows = [{"messages": [HI[0], call]}, {"messages": [HI[0], {"role": "assistant", **other}]}]
    found = [one.messages[1]["tool_calls"][0]["function"]["arguments"] for one in chats(remember_data(rows * 8))]
    assert found.count(arguments) == 8


def test_numbers_in_texts_are_texts() -> None:
    assert chat({"instruction": "1 + 2?", "output": 3}).messages[1]["content"] == "3"


def test_a_prompt_of_several_turns_trains_the_completion_only() -> None:
    read = chat({"prompt": [*HI, HI[0]], "completion": [HI[1], HI[0], HI[1]]})
    assert read.messages == HI * 3
    assert read.answers == [3, 5]


@pytest.mark.parametrize("text", ["[1, 2]", "[]", "[x](y)", '[{"a": 1}]', '{"role": "user", "content": "hi"}'])
def test_a_prompt_that_looks_like_a_list_is_a_text(text: str) -> None:
    assert chat({"prompt": text, "completion": "yo"}).messages[0] == {"role": "user", "content": text}


def test_a_configured_system_turn_begins_the_conversations_that_have_none() -> None:
    own = [{"role": "system", "content": "mine"}, *HI]
    rows = [{"ward": ward, "messages": own if ward == "C" else HI} for ward in "ABCDEFGH"]
    read = chats(remember_data(rows), system="You work in {ward}.")
    begins = sorted(one.messages[0]["content"] for one in read)
    assert begins == ["You work in A.", "You work in B.", *(f"You work in {w}." for w in "DEFGH"), "mine"]
    assert sum(one.own_system for one in read) == 1
    assert all(one.answers == [2] and one.messages[1:] == HI for one in read)
    assert chat({"messages": HI}, system="Be kind.").messages[0] == {"role": "system", "content": "Be kind."}
    assert chat({"messages": HI, "system": " "}).messages == HI
    assert chat({"messages": HI, "system": "x"}, system="").messages == HI


def test_tools_and_calls_pass_to_the_template_without_the_keys_that_arrow_adds(tmp_path: Path) -> None:
    other = {"type": "function", "function": {"name": "sum", "parameters": {"a": {"enum": [1, None]}}}}
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    rows = [
        {"messages": [HI[0], call, {"role": "tool", "content": "7", "name": "find"}, HI[1]], "tools": [TOOL, other]},
        {"messages": HI, "tools": []},
    ]
    pd.DataFrame(rows * 8).to_parquet(tmp_path / "x.parquet")
    expected = [
        HI[0],
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "7", "name": "find"},
        HI[1],
    ]
    for source in (tmp_path / "x.parquet", remember_data(Dataset.from_list(rows * 8)), remember_data(rows * 8)):
        with_tools = [one for one in chats(source) if one.tools]
        assert len(with_tools) == 8
        assert with_tools[0].messages == expected
        assert with_tools[0].answers == [1, 3]
        assert with_tools[0].tools == [TOOL, other]
        assert all(one.messages == HI for one in chats(source) if not one.tools)


@pytest.mark.parametrize(
    "value",
    [
        '{"name": "find", "arguments": {"n": 1, "unit": "km"}}',
        '[{"name": "find", "arguments": "{\\"n\\": 1, \\"unit\\": \\"km\\"}"}]',
    ],
)
def test_a_function_call_of_sharegpt_is_a_call_of_a_tool(value: str) -> None:
    turns = [SHAREGPT[0], {"from": "function_call", "value": value}, {"from": "observation", "value": "7"}, SHAREGPT[1]]
    read = chat({"conversations": turns, "tools": json.dumps([TOOL])})
    assert read.messages == [
        HI[0],
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "7"},
        HI[1],
    ]
    assert read.tools == [TOOL]


def test_arguments_that_are_json_text_become_an_object() -> None:
    call = {"type": "function", "id": "1", "function": {"name": "find", "arguments": '{"n": 1, "unit": null}'}}
    read = chat({"messages": [HI[0], {"role": "assistant", "content": "", "tool_calls": [call]}]})
    assert read.messages[1]["tool_calls"] == [
        {"type": "function", "id": "1", "function": {"name": "find", "arguments": {"n": 1, "unit": None}}}
    ]


@pytest.mark.parametrize("key", ["weight", "train", "training"])
def test_an_answer_that_the_data_exclude_is_not_trained(key: str) -> None:
    excluded = {**HI[1], key: 0 if key == "weight" else False}
    read = chat({"messages": [HI[0], excluded, *HI, HI[0], excluded]})
    assert read.answers == [3]
    assert read.messages == HI * 2
    assert "whose answers are all excluded" in refusal({"messages": [HI[0], excluded]})
    assert f"turn 2: {key} is 0.5, expected 0 or 1" in refusal({"messages": [HI[0], {**HI[1], key: 0.5}]})


def test_turns_after_the_last_answer_and_answers_before_a_question_are_not_trained() -> None:
    read = chat({"messages": [HI[1], *HI, HI[0]]})
    assert read.messages == [HI[1], *HI]
    assert read.answers == [2]
    assert (read.left_over, read.unasked) == (1, 1)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "usr", "content": "hi"}, HI[1]]}, "turn 1: role is 'usr', expected system, .*'user'"),
        ({"messages": [HI[0], {"role": "developer", "content": "hi"}, HI[1]]}, "turn 2: role is 'developer'"),
        ({"conversations": [{"from": "bing", "value": "hi"}, SHAREGPT[1]]}, "turn 1: from is 'bing', expected"),
        ({"messages": [HI[0], SHAREGPT[1]]}, "turn 2: found a message with from and value, expected messages"),
        ({"messages": [{"text": "hi"}]}, "turn 1: found the keys text, expected a message with role and content"),
        ({"messages": ["hi", "yo"]}, "turn 1: found 'hi', expected a message"),
        ({"messages": "hi"}, "found the text 'hi', expected messages as JSON"),
        ({"messages": '{"a": 1}'}, "expected a list of messages"),
        ({"messages": [{"role": "user"}, HI[1]]}, "turn 1: found no content, expected a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, HI[1]]},
            "turn 1: content has a part",
        ),
        (
            {"messages": [{"role": "user", "content": {"a": "b"}}, HI[1]]},
            "turn 1: found content {'a': 'b'}, expected a text",
        ),
        (
            {"messages": [HI[0]]},
            r"without an answer of the assistant \(user\); data.missing: drop leaves out such rows",
        ),
        ({"messages": "[]"}, "an empty conversation"),
        ({"messages": [HI[1], HI[0]]}, "no user's turn comes before an answer"),
        ({"messages": [HI[0], {"role": "assistant", "content": " \n"}]}, "turn 2: the assistant's answer is empty"),
        ({"messages": [{**HI[0], "tool_calls": [CALL]}, HI[1]]}, "turn 1: a user has tool_calls"),
        ({"messages": [HI[0], {"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "turn 2: tool_calls has"),
        (
            {
                "messages": [
                    HI[0],
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "n=1"}}]},
                ]
            },
            "turn 2: the arguments of a tool call is 'n=1', expected JSON",
        ),
        ({"conversations": [SHAREGPT[0], {"from": "function_call", "value": "find(1)"}]}, "turn 2: .*expected JSON"),
        (
            {"conversations": [SHAREGPT[0], {"from": "function_call", "value": '{"a": 1}'}]},
            "turn 2: .*name and arguments",
        ),
        ({"messages": HI, "tools": "find"}, "column 'tools': the cell is 'find', expected JSON"),
        ({"messages": HI, "tools": [1]}, "column 'tools': found 1, expected a list of tools"),
        ({"prompt": HI[:1], "completion": HI}, "completion, turn 1: role is 'user', expected 'assistant'"),
        ({"prompt": [{"role": "x", "content": ""}], "completion": "yo"}, "prompt, turn 1: role is 'x'"),
    ],
)
def test_a_row_that_is_not_a_conversation_is_refused_with_its_turn(row: dict[str, Any], reason: str) -> None:
    line = refusal(row)
    assert re.search(reason, line), line
    assert line.startswith("split train, row 1: ")


@pytest.mark.parametrize(
    ("row", "task", "reason"),
    [
        (
            {"text": "hi"},
            {},
            "found columns text, expected messages or conversations, or instruction and output, or prompt",
        ),
        (
            {"messages": HI, "conversations": SHAREGPT},
            {},
            r"several formats \(messages; conversations\): set task.format",
        ),
        ({"messages": HI, "prompt": "a", "completion": "b"}, {}, "several formats"),
        ({"text": "hi"}, {"messages": "chat"}, "no column 'chat' in split train"),
        ({"text": "hi"}, {"format": "sharegpt"}, "no column 'messages' in split train"),
        ({"text": "hi"}, {"format": "alpaca"}, "no column 'instruction'|no column 'output'"),
        ({"messages": HI}, {"tools": "functions"}, "no column 'functions'"),
        ({"messages": HI}, {"system": "{ward}"}, "no column 'ward'"),
        ({"messages": HI}, {"format": "sharegpt"}, "turn 1: found a message with role and content, expected sharegpt"),
        ({"messages": 3}, {}, "column 'messages' holds int64, expected messages"),
    ],
)
def test_columns_without_one_format_are_refused(row: dict[str, Any], task: dict[str, Any], reason: str) -> None:
    with pytest.raises(FedeltaError, match=reason):
        chats(remember_data([row] * 8), **task)


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ({"system": "{0}"}, "expected only names of columns"),
        ({"format": "alpaca", "messages": "chat"}, "has no column of messages"),
        ({"format": "chatml"}, "Input should be"),
    ],
)
def test_settings_that_contradict_are_refused(task: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Conversation(**task)


def test_incomplete_rows_are_left_out_if_that_is_set(tmp_path: Path) -> None:
    bad = [[], HI[:1], [HI[0], {"role": "assistant", "content": ""}]]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps({"messages": m}) + "\n" for m in [HI, *bad, *[HI] * 7]))
    with pytest.raises(FedeltaError, match=r"x.jsonl, line 2: empty cell in column 'messages'"):
        read_splits(DataSettings(source=str(file)), Conversation())
    with pytest.warns(UserWarning, match="2 rows of train that are incomplete left out"):
        splits, _ = read_splits(DataSettings(source=str(file), missing="drop"), Conversation())
    assert sum(split.num_rows for split in splits.values()) == 8


def test_a_bad_turn_is_named_with_its_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    bad = [HI[0], {"role": "bot", "content": "yo"}]
    file.write_text("".join(json.dumps({"messages": m}) + "\n\n" for m in [HI, HI, bad, HI]))
    with pytest.raises(FedeltaError, match=r"x.jsonl, line 5: turn 2: role is 'bot'"):
        read_splits(DataSettings(source=str(file), missing="drop"), Conversation())
