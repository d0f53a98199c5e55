"""Columns of lists and objects are read as they are written, and compared by their content."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, load_from_disk
from hypothesis import given
from hypothesis import strategies as st

from fedelta.errors import FedeltaError
from fedelta.learning.data import DataSettings, PartitionSettings
from fedelta.learning.data.in_memory import remember_data
from fedelta.learning.data.partition import partition
from fedelta.learning.data.table import DataWarning, without_none
from fedelta.learning.digests import rows_digest
from fedelta.learning.shards import read_splits
from fedelta.learning.tasks import Completion, Conversation
from fedelta.learning.tasks.chat_rows import find_format


def talk(question: str, answer: str = "yo", **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question, **more}, {"role": "assistant", "content": answer}]


def messages_of(source: Any, **settings: Any) -> list[list[dict[str, Any]]]:
    """The messages of all rows of a source, in one order."""
    splits, _ = read_splits(DataSettings(source=str(source), **settings), Conversation())
    rows = [row for split in splits.values() for row in split]
    form = find_format(list(rows[0]), None, None, None, "tools")
    return sorted((form.read(row).messages for row in rows), key=str)


json_values = st.recursive(
    st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.text(max_size=3), json_values, max_size=3), min_size=4, max_size=6))
def test_arguments_of_calls_are_read_from_json_as_they_are_written(arguments: list[dict[str, Any]]) -> None:
    """Arrow would give all rows the same keys, turn 1 into 1.0 next to 1.5, and refuse a number next to a text."""
    calls = [{"type": "function", "function": {"name": str(i), "arguments": own}} for i, own in enumerate(arguments)]
    rows = [{"messages": [*talk("hi"), {"role": "assistant", "tool_calls": [call]}]} for call in calls]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        read = messages_of(remember_data(rows), test=0.25, validation=0.25)
    found = {call["function"]["name"]: call["function"]["arguments"] for m in read for call in m[-1]["tool_calls"]}
    assert json.dumps([found[str(i)] for i in range(len(calls))]) == json.dumps(arguments)


@pytest.mark.parametrize("form", ["jsonl", "frame", "numpy", "disk"])
def test_messages_are_the_same_from_any_source(form: str, tmp_path: Path) -> None:
    rows = [{"messages": talk(f"hi {i}", **({"name": "Al", "n": i + 0.5} if i % 2 else {"n": i}))} for i in range(12)]
    source: Any = tmp_path / "x.jsonl"
    if form == "jsonl":
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "frame":
        source = remember_data(pd.DataFrame(rows))
    elif form == "numpy":
        source = remember_data(pd.DataFrame({"messages": [np.array(row["messages"]) for row in rows]}))
    else:
        # Arrow itself has one type for `n`.
        for row in rows:
            row["messages"][0]["n"] = float(row["messages"][0]["n"])
        Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
        source = tmp_path / "saved"
        assert load_from_disk(str(source))[0]["messages"][0]["name"] is None
    read = messages_of(source)
    expected = sorted((row["messages"] for row in rows), key=lambda messages: int(messages[0]["content"][3:]))
    read.sort(key=lambda messages: int(messages[0]["content"][3:]))
    # Arrow has one order of keys for all messages.
    assert json.dumps(read, sort_keys=form == "disk") == json.dumps(expected, sort_keys=form == "disk")


def test_files_in_which_only_some_messages_have_calls_belong_together(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    plain, calls = [talk(f"hi {i}") for i in range(6)], [[talk("hi")[0], call] for _ in range(6)]
    other = [
        [talk("hi")[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "1"}}}]}]
    ]
    for name, conversations in {"a": plain, "b": calls, "c": [*calls, *other]}.items():
        text = "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)
        (tmp_path / f"{name}.jsonl").write_text(text)
    read = messages_of(tmp_path / "*.jsonl")
    assert read == sorted([*plain, *calls, *calls, *other], key=str)


def test_equal_conversations_are_found_and_kept_once() -> None:
    conversations = [*(talk(f"hi {i}") for i in range(8)), talk("hi 1"), talk("hi 2", "no")]
    source = remember_data([{"messages": messages} for messages in conversations])
    settings = DataSettings(source=source, deduplicate=True)
    with pytest.warns(DataWarning, match="1 row of train left out, because they occur more than once"):
        splits, _ = read_splits(settings, Conversation())
    assert sum(split.num_rows for split in splits.values()) == 9
    splits = {"train": [talk("a"), talk("a"), talk("b"), talk("c")], "test": [talk("b")], "validation": [talk("d")]}
    source = remember_data({name: [{"messages": m} for m in rows] for name, rows in splits.items()})
    with pytest.warns(DataWarning, match="1 of 1 rows of test are also training rows; 1 training rows repeat another"):
        read_splits(DataSettings(source=source), Conversation())


def test_clients_are_made_by_another_column_and_digests_see_the_messages() -> None:
    rows = Dataset.from_list([{"site": "AB"[i % 2], "messages": talk(f"hi {i}")} for i in range(6)])
    parts = partition(rows, [0] * 6, PartitionSettings(kind="natural", by="site"), seed=0)
    assert parts == {"A": [0, 2, 4], "B": [1, 3, 5]}
    other = Dataset.from_list([{"messages": talk(f"hi {i}" if i else "hi zero")} for i in range(6)])
    assert rows_digest(rows, ["messages"]) != rows_digest(other, ["messages"])
    assert rows_digest(rows, ["messages"]) == rows_digest(rows.remove_columns("site"), ["messages", "site"])


def test_keys_without_a_value_are_left_out_at_any_depth() -> None:
    assert without_none({"a": None, "b": [{"c": None, "d": [None, 1]}, {}]}) == {"b": [{"d": [None, 1]}, {}]}


def test_a_task_of_texts_still_refuses_lists_that_arrow_cannot_hold() -> None:
    rows = [{"prompt": "hi", "completion": [{"x": i}, {"x": str(i)}]} for i in range(8)]
    with pytest.raises(FedeltaError, match="column 'completion' mixes types, expected text or numbers"):
        read_splits(DataSettings(source=remember_data(rows)), Completion())


def test_a_text_that_is_not_unicode_is_named_in_lists_as_well() -> None:
    rows = [{"messages": talk("hi", n=1)}, {"messages": talk("\ud800", n="1")}]
    with pytest.raises(FedeltaError, match="row 2: column 'messages' is not valid Unicode"):
        remember_data(rows)
