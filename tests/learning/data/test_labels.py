"""Labels: names of classes as they are written, numbers, rows without a label, and empty cells."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

from fedelta.errors import FedeltaError
from fedelta.learning.data import DataSettings
from fedelta.learning.data.in_memory import remember_data
from fedelta.learning.data.table import DataWarning
from fedelta.learning.shards import read_splits
from fedelta.learning.tasks import Classification, Completion, Regression


def write(folder: Path, labels: list[Any], name: str = "x.csv") -> str:
    rows = [f"text {i},{label}\n" for i, label in enumerate(labels)]
    (folder / name).write_text("text,label\n" + "".join(rows))
    return str(folder / name)


def class_names(folder: Path, labels: list[Any], **settings: Any) -> list[str]:
    return read_splits(DataSettings(source=write(folder, labels), **settings), Classification())[1]


def scores(folder: Path, labels: list[Any], **settings: Any) -> list[float]:
    splits, _ = read_splits(DataSettings(source=write(folder, labels), **settings), Regression())
    return [splits["train"]["label"][i] for i in np.argsort([int(t[5:]) for t in splits["train"]["text"]])]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["007", "3.50", "1e5", "+49 30 1"], ["+49 30 1", "007", "1e5", "3.50"]),
        (["NA", "None", "null", "nan"], ["NA", "None", "nan", "null"]),
        (["10", "9", "1", "0"], ["0", "1", "9", "10"]),
        (["1.0", "0.0"], ["0", "1"]),
        (["True", "False"], ["False", "True"]),
        (["1", "-1"], ["-1", "1"]),
        (["2", "-2", "-1", "1"], ["-2", "-1", "1", "2"]),
        (["+", "-"], ["+", "-"]),
        (["0.5", "1.0", "1.5"], ["0.5", "1.0", "1.5"]),
    ],
)
def test_classes_are_named_as_they_are_written_and_numbers_are_in_order(
    labels: list[str], names: list[str], tmp_path: Path
) -> None:
    assert class_names(tmp_path, labels * 20) == names


def test_whole_floats_in_a_table_are_classes() -> None:
    frame = pd.DataFrame({"text": [f"t{i}" for i in range(40)], "label": [float(i % 2) for i in range(40)]})
    assert read_splits(DataSettings(source=remember_data(frame)), Classification())[1] == ["0", "1"]
    frame["label"] += 0.5
    with pytest.raises(
        FedeltaError, match=r"row 1: column 'label' holds float64 \(0.5\), expected classes.*regression"
    ):
        read_splits(DataSettings(source=remember_data(frame)), Classification())


def test_the_label_of_snli_that_means_none_is_left_out_with_a_count(tmp_path: Path) -> None:
    labels = ["entailment", "neutral", "contradiction", "-"] * 15
    with pytest.warns(DataWarning, match="15 rows of train without a label left out"):
        assert class_names(tmp_path, labels) == ["contradiction", "entailment", "neutral"]


def test_an_uncertain_label_is_refused_with_the_settings_that_decide(tmp_path: Path) -> None:
    labels = ["0", "1", "-1"] * 20
    with pytest.raises(FedeltaError, match="x.csv, line 4: label -1 in 20 rows: no label, or a label.*data.unlabeled"):
        class_names(tmp_path, labels)
    with pytest.warns(DataWarning, match="20 rows of train without a label left out"):
        assert class_names(tmp_path, labels, missing="drop") == ["0", "1"]
    assert class_names(tmp_path, labels, unlabeled=()) == ["-1", "0", "1"]
    assert class_names(tmp_path, labels, unlabeled=[-1]) == ["0", "1"]
    with pytest.raises(FedeltaError, match="line 4: label - in 20 rows: no label, or a label"):
        class_names(tmp_path, ["yes", "no", "-"] * 20)


def test_minus_one_in_a_class_label_column_is_left_out_and_never_the_last_class() -> None:
    feature = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = [{"text": f"t{i}", "label": (0, 1, -1)[i % 3]} for i in range(60)]
    some = datasets.Dataset.from_list(rows, features=feature)
    none = datasets.Dataset.from_list([row | {"label": -1} for row in rows], features=feature)
    with pytest.warns(DataWarning, match="20 rows of train, 20 rows of test without a label left out"):
        splits, names = read_splits(DataSettings(source=remember_data({"train": some, "test": some})), Classification())
    assert names == ["no", "yes"]
    assert {label for split in splits.values() for label in split["label"]} == {0, 1}
    with pytest.raises(FedeltaError, match="none of the 60 rows of test has a label; name another split.*data.splits"):
        read_splits(DataSettings(source=remember_data({"train": some, "test": none})), Classification())


def test_a_hidden_test_split_of_a_regression_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [i / 7 for i in range(40)], "train.csv")
    write(tmp_path, [-1.0] * 40, "test.csv")
    with pytest.raises(FedeltaError, match="test.csv, line 2: all 40 labels of test are -1, which usually means"):
        read_splits(DataSettings(source=str(tmp_path)), Regression())


def test_minus_one_among_scores_of_zero_and_more_is_uncertain(tmp_path: Path) -> None:
    labels = [-1 if i % 10 == 3 else i / 7 for i in range(60)]
    with pytest.raises(FedeltaError, match="line 5: label -1 in 6 rows: no label, or a label"):
        scores(tmp_path, labels)
    assert -1.0 not in scores(tmp_path, labels, missing="drop")
    assert -1.0 in scores(tmp_path, labels, unlabeled=())
    assert -1.0 in scores(tmp_path, [*labels, -0.5])


def test_decimal_commas_are_read_where_they_are_certain(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("text;label\n" + "".join(f"text {i};{i // 10},{i % 10}\n" for i in range(40)))
    with pytest.warns(DataWarning, match="column 'label' have decimal commas, such as 0,0"):
        splits, _ = read_splits(DataSettings(source=str(file)), Regression())
    assert all(row["label"] == int(row["text"][5:]) / 10 for row in splits["train"])
    file.write_text("text;label\n" + "".join(f"text {i};1,{100 + i}\n" for i in range(40)))
    with pytest.raises(FedeltaError, match=r"line 2: '1,100' .* may be a decimal or thousands; set data.decimal"):
        read_splits(DataSettings(source=str(file)), Regression())
    splits, _ = read_splits(DataSettings(source=str(file), decimal=","), Regression())
    assert max(splits["train"]["label"]) < 2


@pytest.mark.parametrize("value", ["n/a", "nan", "inf", "1e999", "1_000", "0x10", "1.234,5", "١"])
def test_what_is_not_a_finite_number_is_refused_by_its_line(value: str, tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("text;label\n" + "".join(f"text {i};{value if i == 5 else i}\n" for i in range(20)))
    with pytest.raises(FedeltaError, match=r"x.csv, line 7: column 'label' holds '.*', expected numbers"):
        read_splits(DataSettings(source=str(file)), Regression())


def test_scores_are_not_taken_for_classes(tmp_path: Path) -> None:
    with pytest.raises(FedeltaError, match="holds 60 different numbers such as '0.0', expected classes.*regression"):
        class_names(tmp_path, [i / 10 for i in range(60)])


def test_labels_that_differ_in_white_space_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FedeltaError, match="the labels 'no' and 'no ' of column 'label' differ in white space only"):
        class_names(tmp_path, ["no", "yes", "no "] * 20)


def test_labels_that_differ_in_case_are_two_classes_and_said(tmp_path: Path) -> None:
    with pytest.warns(DataWarning, match="'No' and 'no' of column 'label' are two classes"):
        assert class_names(tmp_path, ["no", "yes", "No"] * 20) == ["No", "no", "yes"]


def test_a_number_of_ten_thousand_digits_is_a_class_like_any_other(tmp_path: Path) -> None:
    assert class_names(tmp_path, ["1" * 10_000, "2"] * 20) == ["1" * 10_000, "2"]


def test_a_split_without_any_label_is_refused_with_another_one(tmp_path: Path) -> None:
    write(tmp_path, ["a", "b"] * 20, "train.csv")
    write(tmp_path, [""] * 20, "test.csv")
    with pytest.raises(FedeltaError, match="every row of test has an empty cell, the first in column 'label'"):
        read_splits(DataSettings(source=str(tmp_path), missing="drop"), Classification())


def test_a_class_without_training_rows_is_refused_or_said(tmp_path: Path) -> None:
    write(tmp_path, ["a", "b"] * 20, "train.csv")
    write(tmp_path, ["a", "b", "c", "c"] * 5, "test.csv")
    with pytest.raises(FedeltaError, match=r"test.csv, line 4: split test has the label 'c', .* \(10 rows in all\)"):
        read_splits(DataSettings(source=str(tmp_path)), Classification())
    write(tmp_path, ["a"] * 20, "test.csv")
    with pytest.warns(DataWarning, match="no row of test has the class b"):
        assert read_splits(DataSettings(source=str(tmp_path)), Classification())[1] == ["a", "b"]


def test_empty_cells_are_refused_with_file_and_line_or_left_out_with_a_count(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("text,label\n" + "a,x\nb,y\n" * 20 + " \t,x\n,y\nc,\n")
    with pytest.raises(FedeltaError) as refusal:
        read_splits(DataSettings(source=str(file)), Classification())
    assert "x.csv, line 42: empty cell in column 'text' of train (and 2 more rows); data.missing: drop" in str(
        refusal.value
    )
    with pytest.warns(DataWarning, match="3 rows of train with empty cells left out"):
        splits, _ = read_splits(DataSettings(source=str(file), missing="drop"), Classification())
    assert sum(split.num_rows for split in splits.values()) == 40


def test_a_column_of_a_template_with_several_may_be_empty() -> None:
    rows = [{"instruction": f"do {i}", "input": None if i % 2 else "", "output": "done"} for i in range(40)]
    task = Completion(prompt="{instruction} {input}", completion="{output}")
    splits, _ = read_splits(DataSettings(source=remember_data(rows)), task)
    assert sum(split.num_rows for split in splits.values()) == 40
    for column in ("instruction", "output"):
        changed = [row | {column: ""} if i == 3 else row for i, row in enumerate(rows)]
        with pytest.raises(FedeltaError, match=f"split train, row 4: empty cell in column '{column}'"):
            read_splits(DataSettings(source=remember_data(changed)), task)


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (
            [1 if i % 2 else "1" for i in range(40)],
            "mixes types.*row 2 has a number .1., but .*row 1 has",
        ),
        ([None if i == 4 else i % 2 for i in range(40)], "row 5: empty cell in column 'label'"),
        ([float("nan") if i == 4 else float(i % 2) for i in range(40)], "row 5: empty cell in column 'label'"),
        ([np.float32("inf") if i == 4 else np.float32(i % 2) for i in range(40)], "row 5: column 'label' holds"),
        ([[1, 2] for i in range(40)], "column 'label' holds lists or objects, expected classes"),
        ([0, 1, -1, 1] * 10, "row 3: label -1 in 10 rows"),
    ],
)
def test_rows_in_memory_are_checked_like_those_of_a_file(column: list[Any], reason: str) -> None:
    texts = [f"t{i}" for i in range(40)]
    dicts = [{"text": text, "label": label} for text, label in zip(texts, column, strict=True)]
    for data in (dicts, pd.DataFrame({"text": texts, "label": column})):
        with pytest.raises(FedeltaError, match=reason):
            read_splits(DataSettings(source=remember_data(data)), Classification())


def test_categories_and_nullable_integers_of_pandas_are_classes() -> None:
    texts = [f"t{i}" for i in range(40)]
    for column, names in (
        (pd.Categorical(["b", "a"] * 20), ["a", "b"]),
        (pd.array([0, 1] * 20, dtype="Int64"), ["0", "1"]),
        (pd.Series([True, False] * 20), ["False", "True"]),
        (np.array([10, 9] * 20, dtype=np.int8), ["9", "10"]),
    ):
        source = remember_data(pd.DataFrame({"text": texts, "label": column}))
        assert read_splits(DataSettings(source=source), Classification())[1] == names
