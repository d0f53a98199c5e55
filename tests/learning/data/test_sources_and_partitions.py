"""Sources, splits, tokens and partitions of data."""

import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from fedelta.errors import FedeltaError
from fedelta.learning.data import DataSettings, PartitionSettings
from fedelta.learning.data.examples import Examples
from fedelta.learning.data.partition import partition as assign
from fedelta.learning.data.pydoc import CHAPTERS, read_pydoc
from fedelta.learning.data.sources import load_splits
from fedelta.learning.data.table import DataWarning
from fedelta.learning.shards import build_data, read_splits, tokenize_splits
from fedelta.learning.tasks import Classification


def splits_of(settings: DataSettings) -> dict[str, datasets.Dataset]:
    return load_splits(settings, Classification().columns(settings))


def rows_of(splits: dict) -> dict[str, list[str]]:
    return {name: split["text"][:] for name, split in splits.items()}


def test_pydoc_has_about_six_thousand_texts_in_eight_chapters() -> None:
    rows = read_pydoc()
    assert 4000 < len(rows) < 9000
    assert {row["label"] for row in rows} == set(CHAPTERS)
    assert len({row["text"] for row in rows}) == len(rows)
    assert rows == read_pydoc()


def test_a_library_folder_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedeltaError, match=f"no sources of the standard library under {tmp_path}"):
        read_pydoc(tmp_path)


def test_each_module_of_pydoc_belongs_to_one_chapter() -> None:
    modules = [module for names in CHAPTERS.values() for module in names.split()]
    assert not [module for module, count in Counter(modules).items() if count > 1]


def test_splits_are_disjoint_and_reproducible(texts: Path) -> None:
    one, two = (splits_of(DataSettings(source=str(texts))) for _ in range(2))
    assert rows_of(one) == rows_of(two)
    assert {name: split.num_rows for name, split in one.items()} == {"train": 172, "validation": 20, "test": 48}


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_all_file_formats_give_the_same_rows(ending: str, texts: Path, tmp_path: Path) -> None:
    table = datasets.Dataset.from_csv(str(texts))
    file = tmp_path / f"x.{ending}"
    if ending == "tsv":
        table.to_csv(file, sep="\t", index=False)
    elif ending == "csv":
        table.to_csv(file, index=False)
    elif ending == "parquet":
        table.to_parquet(file)
    elif ending == "jsonl":
        table.to_json(file)
    else:
        file.write_text(json.dumps(table.to_list()))
    assert rows_of(splits_of(DataSettings(source=str(file)))) == rows_of(splits_of(DataSettings(source=str(texts))))


def test_the_test_split_of_a_folder_is_used(texts: Path, tmp_path: Path) -> None:
    table = datasets.Dataset.from_csv(str(texts))
    table.select(range(100)).to_parquet(tmp_path / "train-00000-of-00002.parquet")
    table.select(range(100, 200)).to_parquet(tmp_path / "train-00001-of-00002.parquet")
    # As in many real folders, the test split lacks a column of the training split.
    table.select(range(200, 240)).remove_columns("author").to_parquet(tmp_path / "test.parquet")
    (tmp_path / "README.md").write_text("# texts")
    splits = splits_of(DataSettings(source=str(tmp_path)))
    assert splits["test"]["text"][:] == table["text"][200:]
    assert splits["train"].num_rows + splits["validation"].num_rows == 200


def test_limits_set_the_number_of_rows(texts: Path) -> None:
    splits = splits_of(DataSettings(source=str(texts), limit=50, evaluation_limit=10))
    assert {name: split.num_rows for name, split in splits.items()} == {"train": 50, "validation": 10, "test": 10}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"source": "/nowhere/x.csv"}, "data source /nowhere/x.csv: no such file or folder"),
        ({"source": "missing.parquet"}, "missing.parquet: no such file or folder"),
        ({"label": "topic"}, "no column 'topic' in split train, found text, label, author"),
        ({"text": ("text", "other")}, "no column 'other'"),
    ],
)
def test_bad_sources_are_refused(settings: dict, reason: str, texts: Path) -> None:
    with pytest.raises(FedeltaError, match=reason):
        splits_of(DataSettings(**({"source": str(texts)} | settings)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("text,label\na,x\nb,x\nc,x\nd,x\ne,x\nf,x\n", "holds one class only"),
        (
            "text,label\na,0.5\nb,1.5\nc,0.1\nd,3.2\ne,0.7\nf,0.9\n",
            "holds 6 different numbers such as .*, expected",
        ),
        (
            "text,label\na,\nb,x\nc,y\nd,x\ne,y\nf,x\n",
            "line 2: empty cell in column 'label' of train",
        ),
        ("text,label\na,x\n", "leaves too few"),
    ],
)
def test_bad_labels_are_refused(content: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text(content)
    with pytest.raises(FedeltaError, match=reason):
        read_splits(DataSettings(source=str(file)), Classification())


def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    file.write_bytes(b"PAR1 this is not parquet")
    with pytest.raises(FedeltaError, match="data source .*x.parquet: ") as refusal:
        splits_of(DataSettings(source=str(file)))
    assert "\n" not in str(refusal.value)


def partition(rows: datasets.Dataset, labels: list[int], settings: PartitionSettings, seed: int) -> list[list[int]]:
    return list(assign(rows, labels, settings, seed).values())


LABELS = [i % 4 for i in range(400)]
ROWS = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(400)], "by": [f"g{i % 9}" for i in range(400)]})

KINDS = {
    "iid": {"clients": 7},
    "dirichlet": {"clients": 7, "alpha": 0.3},
    "pathological": {"clients": 6, "classes_per_client": 2},
    "shards": {"clients": 5, "shards_per_client": 2},
    "natural": {"by": "by", "clients": 4},
    "two-quality": {"clients": 10, "share": 0.2, "alpha_low": 0.1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_disjoint_and_depend_on_the_seed_alone(kind: str) -> None:
    settings = PartitionSettings(kind=kind, **KINDS[kind])  # type: ignore[arg-type]
    shards = partition(ROWS, LABELS, settings, seed=1)
    rows = [row for shard in shards for row in shard]
    assert len(shards) == settings.clients
    assert len(set(rows)) == len(rows)
    assert shards == partition(ROWS, LABELS, settings, seed=1)
    if kind != "natural":
        assert shards != partition(ROWS, LABELS, settings, seed=2)


def label_shares(shard: list[int]) -> list[float]:
    counts = Counter(LABELS[i] for i in shard)
    return sorted(count / len(shard) for count in counts.values())


def test_iid_shards_have_all_labels_even_if_the_source_is_sorted() -> None:
    sorted_labels = sorted(LABELS)
    for shard in partition(ROWS, sorted_labels, PartitionSettings(clients=5), seed=0):
        assert len({sorted_labels[i] for i in shard}) == 4


def test_pathological_clients_have_the_configured_number_of_labels() -> None:
    for shard in partition(ROWS, LABELS, PartitionSettings(kind="pathological", clients=6, classes_per_client=2), 0):
        assert len(label_shares(shard)) == 2


def test_a_natural_partition_keeps_the_rows_of_a_value_together() -> None:
    shards = partition(ROWS, LABELS, PartitionSettings(kind="natural", by="by", clients=4), 0)
    groups = [{ROWS["by"][i] for i in shard} for shard in shards]
    assert not set.intersection(*groups)
    assert sum(map(len, groups)) == 9
    every = partition(ROWS, LABELS, PartitionSettings(kind="natural", by="by", clients=None), 0)
    assert len(every) == 9


def test_two_quality_clients_have_equal_sizes_and_unequal_label_mixes() -> None:
    settings = PartitionSettings(kind="two-quality", clients=10, share=0.2, alpha_high=100, alpha_low=0.1)
    shards = partition(ROWS, LABELS, settings, seed=3)
    assert {len(shard) for shard in shards} == {40}
    good, others = shards[:2], shards[2:]
    assert max(label_shares(shard)[-1] for shard in good) < 0.5
    assert sum(label_shares(shard)[-1] > 0.5 for shard in others) >= 5


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kind": "iid", "clients": 500}, "500 clients, but only 400 rows"),
        ({"kind": "natural", "by": "nothing"}, "no column 'nothing', found text, by"),
        ({"kind": "natural", "by": "by", "clients": 20}, "20 clients, but only 9 different values"),
        ({"kind": "two-quality", "clients": 500}, "500 clients, but only 400 rows"),
        (
            {"kind": "pathological", "clients": 5, "classes_per_client": 9},
            "classes_per_client is 9, but the training rows have only 4 different classes",
        ),
        (
            {"kind": "shards", "clients": 5, "shards_per_client": 100},
            "5 clients with 100 shards each, but only",
        ),
        ({"kind": "dirichlet", "clients": 5, "alpha": 1e-300}, "400 rows can't be divided among 5 clients; use fewer"),
        ({"kind": "dirichlet", "clients": 400}, "400 rows can't be divided among 400 clients; use fewer clients"),
        (
            {"kind": "two-quality", "clients": 5, "share": 0.5, "alpha_low": 1e-9},
            "can't be divided among 5 clients; use fewer clients, or values of partition.alpha_low",
        ),
        ({"kind": "natural", "by": "__file__"}, "only a source of several files has __file__"),
    ],
)
def test_impossible_partitions_are_refused(settings: dict, reason: str) -> None:
    with pytest.raises(FedeltaError, match=reason):
        partition(ROWS, LABELS, PartitionSettings(**settings), seed=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "iid", "clients": 400},
        {"kind": "dirichlet", "clients": 5, "alpha": 1e300},
        {"kind": "shards", "clients": 400, "shards_per_client": 1},
        {"kind": "two-quality", "clients": 5, "share": 0},
        {"kind": "two-quality", "clients": 40, "share": 1, "alpha_high": 1e300},
    ],
)
def test_extreme_partitions_that_are_possible_give_every_client_a_row(settings: dict) -> None:
    shards = partition(ROWS, LABELS, PartitionSettings(**settings), seed=0)
    assert len(shards) == settings["clients"]
    assert all(shards)


def test_rows_that_belong_to_no_client_are_counted() -> None:
    with pytest.warns(DataWarning, match="partition pathological: 200 of 400 training rows belong to no client"):
        partition(ROWS, LABELS, PartitionSettings(kind="pathological", clients=2, classes_per_client=1), seed=0)


def test_without_a_number_a_natural_partition_has_a_client_for_each_value_named_after_it() -> None:
    values = ["Charité", "LMU/München", "kiel", "Kiel", "../etc", "a b" * 40]
    rows = datasets.Dataset.from_dict({"site": [values[i % 6] for i in range(60)]})
    with pytest.warns(DataWarning, match="'../etc' is etc"):
        shards = assign(rows, [0] * 60, PartitionSettings(kind="natural", by="site"), seed=0)
    assert list(shards) == sorted(shards)
    assert set(shards) == {"Charite", "LMU-Munchen", "Kiel", "kiel-2", "etc", ("a-ba" + "-ba" * 40)[:40]}
    assert {rows["site"][row] for row in shards["Charite"]} == {"Charité"}
    assert {rows["site"][row] for row in shards["kiel-2"]} == {"kiel"}
    assert PartitionSettings(kind="natural", by="site", clients=10).clients == 10
    assert PartitionSettings().clients == 10


def test_a_training_row_without_a_value_has_no_client() -> None:
    rows = datasets.Dataset.from_dict({"site": ["a", None, "b", " "]})
    with pytest.raises(FedeltaError, match="2 training rows of 4 have no value in column 'site'"):
        assign(rows, [0] * 4, PartitionSettings(kind="natural", by="site"), seed=0)


def test_a_client_with_one_row_trains_on_it_and_holds_none_out(texts: Path, tiny_bert: Path) -> None:
    settings = DataSettings(source=str(texts), limit=10)
    splits, classes = read_splits(settings, Classification())
    tokenized = tokenize_splits(settings, Classification(), splits, classes, AutoTokenizer.from_pretrained(tiny_bert))
    with pytest.warns(DataWarning, match="10 clients with one row hold none out: client-000, client-001, client-002"):
        data = build_data(tokenized, settings, PartitionSettings(clients=10), seed=0)
    assert {(len(shard.train), len(shard.validation)) for shard in data.shards.values()} == {(1, 0)}
    data = build_data(
        tokenized, settings.model_copy(update={"client_validation": 0.9}), PartitionSettings(clients=5), 0
    )
    assert {(len(shard.train), len(shard.validation)) for shard in data.shards.values()} == {(1, 1)}


def test_pairs_of_texts_are_tokenized_together(tmp_path: Path, tiny_bert: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("a,b,label\n" + "".join(f"the ship,old moon,{'xy'[i % 2]}\n" for i in range(10)))
    settings = DataSettings(source=str(file), text=("a", "b"))
    splits, classes = read_splits(settings, Classification())
    tokenized = tokenize_splits(settings, Classification(), splits, classes, AutoTokenizer.from_pretrained(tiny_bert))
    assert tokenized.classes == ["x", "y"]
    feature = tokenized.train.features[0]
    assert len(feature["input_ids"]) == 7
    assert feature["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_a_batch_is_padded_to_its_longest_text_and_evaluation_sorts_texts_by_length(tiny_bert: Path) -> None:
    lengths = [3 + (7 * i) % 20 for i in range(64)]
    examples = Examples([{"input_ids": [4] * n} for n in lengths], [0] * 64)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    order = list(examples.training_order(8, seed=1))
    assert sorted(i for batch in order for i in batch) == list(range(64))
    assert order == list(examples.training_order(8, seed=1))
    assert order != list(examples.training_order(8, seed=2))
    padded = 0
    for rows in order:
        batch = examples.batch(rows, tokenizer)
        longest = max(lengths[i] for i in rows)
        assert batch["input_ids"].shape == (8, longest)
        assert batch["attention_mask"].sum() == sum(lengths[i] for i in rows)
        padded += 8 * longest
    assert padded < 64 * max(lengths)
    by_length = [lengths[i] for batch in examples.evaluation_order(8) for i in batch]
    assert by_length == sorted(lengths)


def test_held_out_rows_and_the_servers_rows_are_disjoint_from_training_rows(texts: Path, tiny_bert: Path) -> None:
    file = texts.parent / "numbered.csv"
    file.write_text(
        "text,label\n" + "".join(f"{'the ' * (i // 60)}{'old ' * (i % 60)}sea,{'xy'[i % 2]}\n" for i in range(240))
    )
    settings = DataSettings(source=str(file), client_validation=0.25, max_length=100)
    splits, classes = read_splits(settings, Classification())
    tokenized = tokenize_splits(settings, Classification(), splits, classes, AutoTokenizer.from_pretrained(tiny_bert))
    data = build_data(tokenized, settings, PartitionSettings(clients=5), seed=0)
    parts = [part for shard in data.shards.values() for part in (shard.train, shard.validation)]
    texts_of = [[tuple(f["input_ids"]) for f in part.features] for part in (*parts, data.validation, data.test)]
    everything = [text for part in texts_of for text in part]
    assert len(everything) == 240
    assert len(set(everything)) == 240
    for shard in data.shards.values():
        assert len(shard.validation) == round(0.25 * (len(shard.train) + len(shard.validation)))


def test_a_limit_draws_random_rows_and_not_the_first_ones(texts: Path) -> None:
    full = rows_of(splits_of(DataSettings(source=str(texts))))["train"]
    drawn = rows_of(splits_of(DataSettings(source=str(texts), limit=50)))["train"]
    assert set(drawn) <= set(full)
    assert drawn != full[:50]


def test_a_split_can_be_renamed_or_omitted(texts: Path, tmp_path: Path) -> None:
    table = datasets.Dataset.from_csv(str(texts))
    table.select(range(150)).to_parquet(tmp_path / "train.parquet")
    table.select(range(150, 200)).to_parquet(tmp_path / "validation.parquet")
    table.select(range(200, 240)).remove_columns("label").to_parquet(tmp_path / "test.parquet")
    with pytest.raises(FedeltaError, match="no column 'label' in split test"):
        splits_of(DataSettings(source=str(tmp_path)))
    with pytest.raises(FedeltaError, match="'validation' is used twice"):
        splits_of(DataSettings(source=str(tmp_path), splits={"test": "validation"}))
    splits = splits_of(DataSettings(source=str(tmp_path), splits={"test": "validation", "validation": None}))
    assert splits["test"]["text"][:] == table["text"][150:200]
    assert splits["train"].num_rows == 135


def test_a_column_that_the_partition_does_not_use_is_said() -> None:
    settings = PartitionSettings(kind="iid", by="by", clients=4)
    with pytest.warns(
        DataWarning, match="partition.by 'by' is not used, because partition.kind is iid: 4 clients draw"
    ):
        assert len(partition(ROWS, LABELS, settings, 0)) == 4
