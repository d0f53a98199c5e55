"""Draws of rows that keep rare classes, and rows that occur more than once."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedelta.errors import FedeltaError
from fedelta.learning.data import DataSettings
from fedelta.learning.data.splits import draw_by_class
from fedelta.learning.data.table import DataWarning
from fedelta.learning.shards import read_splits
from fedelta.learning.tasks import Classification, Completion


def write(file: Path, labels: list[str], first: int = 0) -> str:
    file.write_text("text,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(labels, first)))
    return str(file)


def counts(settings: DataSettings) -> dict[str, Counter]:
    splits, _ = read_splits(settings, Classification())
    return {name: Counter(split["label"]) for name, split in splits.items()}


def test_a_rare_class_is_in_every_split_that_it_has_rows_for(tmp_path: Path) -> None:
    source = write(tmp_path / "x.csv", ["a"] * 100 + ["b"] * 97 + ["rare"] * 3)
    for seed in range(5):
        found = counts(DataSettings(source=source, split_seed=seed))
        assert {name: split["rare"] for name, split in found.items()} == {"train": 1, "validation": 1, "test": 1}
        assert {name: split.total() for name, split in found.items()} == {"train": 144, "validation": 16, "test": 40}
        assert abs(found["test"]["a"] - 20) <= 1


def test_a_class_of_one_row_is_trained_and_said_to_be_missing_elsewhere(tmp_path: Path) -> None:
    source = write(tmp_path / "x.csv", ["a"] * 30 + ["b"] * 30 + ["one"])
    with pytest.warns(DataWarning, match="no row of validation has the class one; no row of test has the class one"):
        found = counts(DataSettings(source=source))
    assert found["train"]["one"] == 1


def test_without_stratify_a_lost_class_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "x.csv", ["a"] * 100 + ["b"] * 97 + ["rare"] * 1)
    lost = 0
    for seed in range(20):
        try:
            lost += "rare" not in counts(DataSettings(source=source, split_seed=seed, stratify=False))["train"]
        except FedeltaError as error:
            assert "'rare', which no training row has; set data.stratify: true" in str(error)  # noqa: PT017
            lost += 1
    assert lost


def test_a_draw_that_loses_no_class_is_the_plain_one(tmp_path: Path) -> None:
    source = write(tmp_path / "x.csv", ["a", "b"] * 100)
    one, two = (
        read_splits(DataSettings(source=source, stratify=stratify, limit=50), Classification())[0]
        for stratify in (True, False)
    )
    assert {k: v["text"][:] for k, v in one.items()} == {k: v["text"][:] for k, v in two.items()}


def test_a_limit_keeps_every_class(tmp_path: Path) -> None:
    source = write(tmp_path / "x.csv", ["a"] * 400 + ["b"] * 395 + ["rare"] * 5)
    for seed in range(5):
        found = counts(DataSettings(source=source, split_seed=seed, limit=20, evaluation_limit=10))
        assert found["train"]["rare"] == 1
        assert {name: split.total() for name, split in found.items()} == {"train": 20, "validation": 10, "test": 10}


@pytest.mark.parametrize("leave_one", [True, False])
@pytest.mark.parametrize("sizes", [[1, 1], [2, 2], [50, 3, 1], [7, 7, 7, 7], [1000, 1, 1, 1], [2]])
def test_a_draw_by_class_takes_the_number_where_the_classes_allow_it(sizes: list[int], leave_one: bool) -> None:
    labels = [name for name, size in enumerate(sizes) for _ in range(size)]
    most = sum(size - leave_one for size in sizes)
    for number in range(1, len(labels) + 1, max(1, len(labels) // 20)):
        rows = draw_by_class(labels, number, seed=0, leave_one=leave_one)
        assert len(rows) == len(set(rows)) == min(number, most)
        drawn = Counter(labels[row] for row in rows)
        assert all(drawn[name] <= size - leave_one for name, size in enumerate(sizes))
        if number >= len(sizes):
            assert all(drawn[name] >= min(1, size - leave_one) for name, size in enumerate(sizes))
        assert rows == draw_by_class(labels, number, seed=0, leave_one=leave_one)


def triple(folder: Path) -> str:
    file = folder / "x.csv"
    file.write_text("text,label\n" + "".join(f"text {i % 200},{'ab'[i % 2]}\n" for i in range(600)))
    return str(file)


def test_rows_that_occur_in_several_splits_are_counted(tmp_path: Path) -> None:
    settings = DataSettings(source=triple(tmp_path))
    with pytest.warns(DataWarning) as said:
        splits, _ = read_splits(settings, Classification())
    train = set(splits["train"]["text"])
    shared = sum(text in train for text in splits["test"]["text"])
    lines = [str(warning.message) for warning in said]
    assert shared > 100
    assert any(f"{shared} of 120 rows of test are also training rows" in line for line in lines)
    assert any("data.deduplicate: true" in line for line in lines)


def test_deduplicate_keeps_each_row_once(tmp_path: Path, recwarn: Any) -> None:
    splits, _ = read_splits(DataSettings(source=triple(tmp_path), deduplicate=True), Classification())
    texts = [text for split in splits.values() for text in split["text"]]
    assert len(texts) == len(set(texts)) == 200
    assert [str(w.message) for w in recwarn if w.category is DataWarning] == [
        "data: 400 rows of train left out, because they occur more than once"
    ]


def test_deduplicate_takes_rows_from_the_training_rows_and_none_from_the_test_split(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", ["a", "b"] * 50)
    write(tmp_path / "test.csv", ["a", "b"] * 10, first=90)
    splits, _ = read_splits(DataSettings(source=str(tmp_path), deduplicate=True), Classification())
    assert splits["test"].num_rows == 20
    assert splits["train"].num_rows + splits["validation"].num_rows == 90


def test_texts_with_different_labels_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("text,label\n" + "".join(f"text {i % 50},{'ab'[i % 2]}\n" for i in range(50)) + "text 0,b\n")
    with pytest.warns(DataWarning, match="1 texts have different labels"):
        read_splits(DataSettings(source=str(file)), Classification())


def test_rows_of_a_group_stay_together_and_one_group_alone_cannot_be_divided(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("prompt,completion,id\n" + "".join(f"p,{i},g\n" for i in range(20)))
    with pytest.raises(FedeltaError, match="all 20 rows have the same 'id', so none can be held out"):
        read_splits(DataSettings(source=str(file)), Completion(group="id"))
