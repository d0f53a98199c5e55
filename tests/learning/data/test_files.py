"""Folders, patterns and lists of files: exact names of splits, and a client for each file."""

import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedelta.errors import FedeltaError
from fedelta.learning.data import DataSettings, PartitionSettings
from fedelta.learning.data.files import file_names
from fedelta.learning.data.partition import partition
from fedelta.learning.data.table import DataWarning
from fedelta.learning.shards import read_splits
from fedelta.learning.tasks import Classification


def rows(first: int, count: int) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(first, first + count)]
    )


def write(file: Path, first: int = 0, count: int = 40) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = rows(first, count)
    file.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in table))
    return file


def texts(settings: DataSettings) -> dict[str, set[str]]:
    splits, _ = read_splits(settings, Classification())
    return {name: set(split["text"]) for name, split in splits.items()}


def refusal(settings: DataSettings) -> str:
    with pytest.raises(FedeltaError) as error:
        read_splits(settings, Classification())
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_that_is_not_named_as_a_split_is_named_and_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.csv")
    write(tmp_path / "test.csv", 40, 20)
    for name in ("train_notes.csv", "testing.csv", "validate.jsonl", "notes.csv"):
        other = write(tmp_path / name, 60)
        assert f"{name}: expected names train, validation (valid, val, dev) or test" in refusal(
            DataSettings(source=str(tmp_path))
        )
        other.unlink()
    (tmp_path / "README.md").write_text("texts")
    (tmp_path / ".train.csv").write_text("x")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert texts(DataSettings(source=str(tmp_path)))["test"] == set(rows(40, 20)["text"])


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "VAL"])
def test_the_validation_split_has_several_names_but_only_one_at_a_time(name: str, tmp_path: Path) -> None:
    write(tmp_path / "train.csv")
    write(tmp_path / f"{name}.csv", 40, 10)
    assert texts(DataSettings(source=str(tmp_path)))["validation"] == set(rows(40, 10)["text"])
    write(tmp_path / ("dev.jsonl" if name != "dev" else "validation.csv"), 50, 10)
    assert "are all the split validation, expected one of them" in refusal(DataSettings(source=str(tmp_path)))


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00003.csv")
    write(tmp_path / "train-00002-of-00003.csv", 40)
    assert "2 of 3 shards of the split train are there" in refusal(DataSettings(source=str(tmp_path)))
    write(tmp_path / "train-00001-of-00003.csv", 80)
    assert sum(map(len, texts(DataSettings(source=str(tmp_path))).values())) == 120


def test_splits_may_be_files(tmp_path: Path) -> None:
    write(tmp_path / "mine.csv")
    write(tmp_path / "theirs.csv", 40, 20)
    expected = set(rows(40, 20)["text"])
    in_folder = DataSettings(source=str(tmp_path), splits={"train": "mine.csv", "test": "theirs.csv"})
    beside = DataSettings(source=str(tmp_path / "mine.csv"), splits={"test": "theirs.csv"})
    elsewhere = DataSettings(source=str(tmp_path / "mine.csv"), splits={"test": str(tmp_path / "theirs.csv")})
    for settings in (in_folder, beside, elsewhere):
        assert texts(settings)["test"] == expected
    missing = DataSettings(source=str(tmp_path / "mine.csv"), splits={"test": "absent"})
    assert "has no split 'absent', found train; nor is it a file" in refusal(missing)
    assert "no such file or folder" in refusal(missing.model_copy(update={"splits": {"test": "./absent.csv"}}))


def test_several_files_are_training_rows_and_a_file_can_be_a_client(tmp_path: Path) -> None:
    write(tmp_path / "sites" / "bonn.csv")
    write(tmp_path / "sites" / "kiel.csv", 40, 20)
    folder = str(tmp_path / "sites")
    assert "bonn.csv, kiel.csv: expected names train" in refusal(DataSettings(source=folder))
    for source in (f"{folder}/*.csv", (f"{folder}/bonn.csv", f"{folder}/kiel.csv")):
        splits, _ = read_splits(DataSettings(source=source), Classification())
        by_file = partition(
            splits["train"], [0] * splits["train"].num_rows, PartitionSettings(kind="natural", by="__file__"), 0
        )
        assert list(by_file) == ["bonn", "kiel"]
        bonn = set(rows(0, 40)["text"])
        assert {splits["train"]["text"][row] for row in by_file["bonn"]} <= bonn
        assert not {splits["train"]["text"][row] for row in by_file["kiel"]} & bonn


def test_files_are_named_by_what_tells_them_apart() -> None:
    assert file_names([Path("a/x.csv.gz"), Path("a/y.csv")]) == ["x", "y"]
    assert file_names([Path("a/bonn/train.csv"), Path("a/kiel/train.csv")]) == ["bonn", "kiel"]
    assert file_names([Path("a/bonn/x.csv"), Path("a/kiel/y.csv")]) == ["bonn/x", "kiel/y"]
    assert file_names([Path("x.csv"), Path("x.tsv")]) == ["x.csv", "x.tsv"]


def test_files_with_different_columns_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one.csv")
    (tmp_path / "two.csv").write_text("text,label,site\na,b,c\n")
    line = refusal(DataSettings(source=f"{tmp_path}/*.csv"))
    assert "two.csv has a column 'site' and" in line
    assert "lists this file twice" in refusal(DataSettings(source=(str(one), str(one))))
    assert "no data file matches this pattern" in refusal(DataSettings(source=f"{tmp_path}/*.jsonl"))


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    rows(0, 40).save_to_disk(tmp_path / "one")
    assert sum(map(len, texts(DataSettings(source=str(tmp_path / "one"))).values())) == 40
    datasets.DatasetDict(train=rows(0, 40), test=rows(40, 20)).save_to_disk(tmp_path / "two")
    assert texts(DataSettings(source=str(tmp_path / "two")))["test"] == set(rows(40, 20)["text"])


def test_a_copy_of_a_hub_repository_is_read_by_exact_names(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00001.csv")
    write(tmp_path / "data" / "test-00000-of-00001.csv", 40, 20)
    with pytest.warns(DataWarning, match=r"read train \(40\), test \(20\)"):
        assert texts(DataSettings(source=str(tmp_path)))["test"] == set(rows(40, 20)["text"])
    write(tmp_path / "data" / "my-train-notes.csv", 60)
    assert "data/my-train-notes.csv: expected names train" in refusal(DataSettings(source=str(tmp_path)))


def test_columns_of_parquet_that_are_not_used_may_have_any_type(tmp_path: Path) -> None:
    cells = rows(0, 40)
    maps = pa.array([[("k", 1)]] * 40, pa.map_(pa.string(), pa.int64()))
    texts_view = pa.array(cells["text"][:], pa.string_view())
    labels = pa.array(cells["label"][:]).dictionary_encode()
    pq.write_table(pa.table({"text": texts_view, "label": labels, "more": maps}), tmp_path / "x.parquet")
    splits, names = read_splits(DataSettings(source=str(tmp_path / "x.parquet")), Classification())
    assert names == ["a", "b"]
    assert "more" not in splits["train"].column_names


def test_text_and_label_are_different_columns() -> None:
    with pytest.raises(ValueError, match="text and label name the same column, 'x'"):
        DataSettings(text=("a", "x"), label="x")


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    (tmp_path / "gone.csv").symlink_to(tmp_path / "absent.csv")
    for name, reason in {
        "pipe.csv": "neither a file nor a folder",
        "folder.csv": "the folder has no data files, expected train, validation or test as .csv",
        "loop.csv": "no such file or folder",
        "gone.csv": "no such file or folder",
    }.items():
        assert reason in refusal(DataSettings(source=str(tmp_path / name)))
    assert "neither a file nor a folder" in refusal(DataSettings(source="/dev/zero"))
    assert "no such file or folder" in refusal(DataSettings(source="/" + "z" * 200 + "/" + "x" * 200 + ".csv"))
    assert "File name too long" in refusal(DataSettings(source="/" + "z" * 400 + "/x.csv"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.csv").chmod(0)
    assert "Permission denied" in refusal(DataSettings(source=str(tmp_path / "x.csv")))
