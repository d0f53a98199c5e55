"""`fedelta predict` computes what plain transformers and PEFT compute with the same adapter."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas
import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fedelta
from command import fedelta as command
from command import refusal
from fedelta.errors import FedeltaError
from fedelta.learning.data.sources import load_splits
from fedelta.runs.config import parse_config
from fedelta.runs.output_table import write_rows
from fedelta.runs.runner import Run, run

LEARNS = {"method": "fedex", "rounds": 4, "training": {"epochs": 2, "batch_size": 8, "learning_rate": 0.01}}
TEXTS = ["a ship in the tide", "the bright moon", "old barn and field near the river", "star", "the a of and"]


@pytest.fixture
def finished(tiny_config: Any) -> Run:
    return run(tiny_config(**LEARNS))


@pytest.fixture(scope="module")
def adapter(tiny_bert: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a short run."""
    data = {"source": str(texts), "max_length": 16}
    output = str(tmp_path_factory.mktemp("runs"))
    config = {"output": output, "model": {"name": str(tiny_bert)}, "data": data, "rounds": 1, "workers": 1}
    return run(parse_config(config | {"partition": {"clients": 2}, "training": {"steps": 1}})).adapter


def plain_probabilities(folder: Path, texts: list[Any], length: int = 16) -> torch.Tensor:
    """What transformers and PEFT alone compute, one text at a time: (texts, classes), float64."""
    fields = json.loads((folder / "adapter_config.json").read_text())
    labels = json.loads((folder / "labels.json").read_text())["id2label"]
    base = AutoModelForSequenceClassification.from_pretrained(fields["base_model_name_or_path"], num_labels=len(labels))
    tokenizer = AutoTokenizer.from_pretrained(fields["base_model_name_or_path"])
    base.config.pad_token_id = tokenizer.pad_token_id
    model = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        rows = [
            model(
                **tokenizer(
                    *([t] if isinstance(t, str) else t), truncation=True, max_length=length, return_tensors="pt"
                )
            )
            for t in texts
        ]
    return torch.cat([row.logits.double().softmax(-1) for row in rows])


def write_csv(file: Path, rows: list[dict[str, Any]]) -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def test_probabilities_equal_those_of_plain_transformers_and_peft(finished: Run) -> None:
    expected = plain_probabilities(finished.adapter, TEXTS)
    table = fedelta.predict(finished, TEXTS, probabilities=True)
    names = ["land", "sea", "sky"]
    assert list(table.columns) == ["text", "prediction", "probability", *(f"probability_{name}" for name in names)]
    assert list(table["text"]) == TEXTS
    found = torch.tensor(table[[f"probability_{name}" for name in names]].to_numpy())
    assert torch.allclose(found, expected, atol=1e-6)
    assert list(table["prediction"]) == [names[i] for i in expected.argmax(-1).tolist()]
    assert len(set(table["prediction"])) > 1
    assert torch.allclose(torch.tensor(table["probability"]), expected.max(-1).values, atol=1e-6)
    alone = fedelta.predict(finished.adapter, pandas.DataFrame({"text": TEXTS}), batch_size=1)
    assert list(alone["prediction"]) == list(table["prediction"])


def test_the_test_split_has_the_score_of_the_run(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = finished.config
    split = load_splits(config.data, config.task.columns(config.data))["test"]
    file = write_csv(tmp_path / "test.csv", split.to_list())
    assert command("predict", str(finished.folder.path), str(file), "-o", str(tmp_path / "out.csv")) == 0
    shown = capsys.readouterr().out
    assert f"accuracy {100 * finished.test['accuracy']:.2f} %" in shown
    assert f"macro F1 {100 * finished.test['macro_f1']:.2f} %" in shown


def test_an_exported_adapter_works_without_its_run(finished: Run, tmp_path: Path) -> None:
    expected = fedelta.predict(finished, TEXTS, probabilities=True)
    fedelta.export(finished, adapter=tmp_path / "exported")
    shutil.move(finished.folder.path, tmp_path / "gone")
    pandas.testing.assert_frame_equal(fedelta.predict(tmp_path / "exported", TEXTS, probabilities=True), expected)
    (tmp_path / "exported" / "task.json").unlink()
    pandas.testing.assert_frame_equal(fedelta.predict(tmp_path / "exported", TEXTS, probabilities=True), expected)
    (tmp_path / "exported" / "labels.json").unlink()
    with pytest.raises(FedeltaError, match=r"no labels.json, which has the names of the classes"):
        fedelta.predict(tmp_path / "exported", TEXTS)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet", "xlsx"])
def test_every_format_of_data_is_read(suffix: str, finished: Run, tmp_path: Path) -> None:
    rows = pandas.DataFrame({"n": [3, 1, 2, 5, 4], "body": TEXTS})
    file = tmp_path / f"rows.{suffix}"
    if suffix == "xlsx":
        pytest.importorskip("openpyxl")
        rows.to_excel(file, index=False)
    elif suffix in ("csv", "tsv"):
        rows.to_csv(file, index=False, sep="," if suffix == "csv" else "\t")
    elif suffix == "jsonl":
        rows.to_json(file, orient="records", lines=True)
    else:
        rows.to_parquet(file)
    expected = list(fedelta.predict(finished, TEXTS)["prediction"])
    output = tmp_path / "out.jsonl"
    assert command("predict", str(finished.folder.path), str(file), "-o", str(output), "--text", "body") == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prediction"] for line in lines] == expected
    assert [str(line["n"]) for line in lines] == ["3", "1", "2", "5", "4"]
    assert [line["body"] for line in lines] == TEXTS


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_of_output_has_all_rows_in_order(suffix: str, finished: Run, tmp_path: Path) -> None:
    rows = [{"id": f"00{i}", "text": f'{text}, "{i}"\nend'} for i, text in enumerate(TEXTS)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / f"out.{suffix}"
    assert command("predict", str(finished.folder.path), str(file), "-o", str(output), "--probabilities") == 0
    if suffix == "parquet":
        found = pq.read_table(output).to_pylist()
    elif suffix == "jsonl":
        found = [json.loads(line) for line in output.read_text().splitlines()]
    else:
        with output.open(newline="") as stream:
            found = list(csv.DictReader(stream, delimiter="," if suffix == "csv" else "\t"))
    assert [{key: row[key] for key in ("id", "text")} for row in found] == rows
    expected = plain_probabilities(finished.adapter, [row["text"] for row in rows])
    values = [[float(row[f"probability_{name}"]) for name in ("land", "sea", "sky")] for row in found]
    assert torch.allclose(torch.tensor(values, dtype=torch.float64), expected, atol=1e-6)


def test_pairs_of_texts_are_read_from_two_columns(tiny_config: Any, texts: Path, tmp_path: Path) -> None:
    with texts.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    pairs = [{"one": row["text"], "two": row["author"], "label": row["label"]} for row in rows]
    file = write_csv(tmp_path / "pairs.csv", pairs)
    data = {"source": str(file), "text": ["one", "two"], "max_length": 16}
    finished = run(tiny_config(data=data, partition={"clients": 4}, rounds=2))
    expected = plain_probabilities(finished.adapter, [(row["one"], row["two"]) for row in pairs[:9]])
    table = fedelta.predict(finished, pairs[:9], probabilities=True)
    values = torch.tensor(table[["probability_land", "probability_sea", "probability_sky"]].to_numpy())
    assert torch.allclose(values, expected, atol=1e-6)
    with pytest.raises(FedeltaError, match="reads pairs of texts, found 1 column"):
        fedelta.predict(finished, pairs, text="one")
    with pytest.raises(FedeltaError, match="reads pairs of texts: pass rows with the columns one, two"):
        fedelta.predict(finished, ["a text"])


def test_a_regression_predicts_numbers_and_is_scored(
    tiny_config: Any, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with texts.open(newline="") as stream:
        rows = [{"text": row["text"], "label": str(len(row["text"]) / 10)} for row in csv.DictReader(stream)]
    file = write_csv(tmp_path / "numbers.csv", rows)
    finished = run(
        tiny_config(task="regression", data={"source": str(file), "max_length": 16}, partition={"clients": 4})
    )
    config = finished.config
    split = load_splits(config.data, config.task.columns(config.data))["test"]
    test = write_csv(tmp_path / "test.csv", split.to_list())
    output = tmp_path / "out.jsonl"
    assert command("predict", str(finished.folder.path), str(test), "-o", str(output)) == 0
    assert f"Pearson correlation {100 * finished.test['pearson']:.2f} %" in capsys.readouterr().out
    base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=1)
    model = peft.PeftModel.from_pretrained(base, str(finished.adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished.adapter)
    with torch.no_grad():
        expected = [
            float(model(**tokenizer(row["text"], truncation=True, max_length=16, return_tensors="pt")).logits)
            for row in split
        ]
    found = [json.loads(line)["prediction"] for line in output.read_text().splitlines()]
    assert found == pytest.approx(expected, abs=1e-5)
    assert "probability" not in json.loads(output.read_text().splitlines()[0])


def test_rows_without_a_label_do_not_count_and_unknown_classes_are_wrong(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predicted = list(fedelta.predict(finished, TEXTS)["prediction"])
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, predicted, strict=True)]
    rows[3]["label"], rows[4]["label"] = "", "fire"
    file = write_csv(tmp_path / "rows.csv", rows)
    place = str(finished.folder.path)
    assert command("predict", place, str(file), "-o", str(tmp_path / "out.csv")) == 0
    shown = capsys.readouterr().out
    assert "accuracy 75.00 %" in shown
    assert "(without 1 row that has no label; not known to the model, so always wrong: fire)" in shown
    write_csv(file, [{"text": "a", "label": "fire"}])
    assert command("predict", place, str(file), "-o", str(tmp_path / "none.csv")) == 0
    assert "no score: no label in column 'label' is one that the model knows" in capsys.readouterr().err


_CELLS = st.text(st.sampled_from("ab,;\"'\t\r\n "), max_size=6)


@given(st.lists(st.tuples(_CELLS, _CELLS), min_size=1, max_size=5), st.sampled_from(["csv", "tsv"]))
def test_whatever_a_cell_holds_readers_of_the_written_table_see_the_same_cells(
    rows: list[tuple[str, str]], suffix: str
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"out.{suffix}"
        write_rows(path, pa.table({"one": [row[0] for row in rows], "two": [row[1] for row in rows]}))
        delimiter = "," if suffix == "csv" else "\t"
        with path.open(newline="", encoding="utf-8") as stream:
            found = [(row["one"], row["two"]) for row in csv.DictReader(stream, delimiter=delimiter)]
        table = pandas.read_csv(path, sep=delimiter, keep_default_na=False, dtype=str)
    assert found == rows
    assert list(table.itertuples(index=False, name=None)) == rows


def test_probabilities_have_six_digits_in_every_format(finished: Run, tmp_path: Path) -> None:
    file = write_csv(tmp_path / "rows.csv", [{"text": text} for text in TEXTS])
    output = tmp_path / "out.jsonl"
    assert command("predict", str(finished.folder.path), str(file), "-o", str(output), "--probabilities") == 0
    values = [value for line in output.read_text().splitlines() for value in list(json.loads(line).values())[2:]]
    assert len(values) == 4 * len(TEXTS)
    assert values == [float(f"{value:.6g}") for value in values]


def test_without_an_output_the_first_rows_are_printed(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_csv(tmp_path / "rows.csv", [{"id": f"n{i}", "text": f"ship{i}"} for i in range(25)])
    assert command("predict", str(finished.folder.path), str(file)) == 0
    shown = capsys.readouterr().out
    expected = fedelta.predict(finished, [f"ship{i}" for i in range(25)])
    for i, row in expected.head(20).iterrows():
        (line,) = [line for line in shown.splitlines() if f" ship{i} " in line]
        assert row["prediction"] in line
        assert f"{row['probability']:.6g}" in line
    assert "ship20" not in shown
    assert "5 more rows; -o FILE writes all of them" in shown


def test_a_wrong_file_is_refused_before_the_model_is_loaded(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = write_csv(tmp_path / "a.csv", [{"body": "a"}]), tmp_path / "out.csv"
    place = str(finished.folder.path)
    line = refusal(capsys, "predict", place, str(file), "-o", str(output), "--base", "/gone")
    assert "no column 'text', found body" in line
    with pytest.raises(FedeltaError, match="no column 'text', found body"):
        fedelta.predict(place, file, base="/gone")
    with pytest.raises(FedeltaError, match="my parcel is late: no such file; texts are passed as a list"):
        fedelta.predict(place, "my parcel is late")
    with pytest.raises(FedeltaError, match="rows is empty, expected at least one row or text"):
        fedelta.predict(place, [])


def test_an_adapter_on_a_base_of_another_size_names_a_tensor_with_both_shapes(
    finished: Run, tiny_bert: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_bert)
    config.hidden_size, config.intermediate_size = 2 * config.hidden_size, 2 * config.intermediate_size
    other = tmp_path / "other"
    shutil.copytree(tiny_bert, other)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(other)
    with pytest.raises(FedeltaError, match=r"does not fit the base model .*/other: .*lora_\S+ is \(.*\), expected \("):
        fedelta.predict(finished, TEXTS, base=other)


def test_a_base_with_a_relative_name_is_found_from_any_folder(
    tiny_config: Any, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    shutil.copytree(tiny_bert, here / "m")
    monkeypatch.chdir(here)
    trained = run(tiny_config(model={"name": "m"}, rounds=1))
    expected = fedelta.predict(trained, TEXTS)
    monkeypatch.chdir(there)
    assert fedelta.predict(trained.folder.path, TEXTS).equals(expected)
    (here / "m").rename(here / "n")
    with pytest.raises(FedeltaError, match="here/m: no such folder; if the base model has moved, name its folder"):
        fedelta.predict(trained.folder.path, TEXTS)


def test_nothing_is_printed_on_standard_error(finished: Run) -> None:
    program = f"import fedelta; fedelta.predict({str(finished.folder.path)!r}, ['a ship'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "is_gradient_checkpointing" not in done.stderr


def test_a_method_without_a_global_model_predicts_as_one_client(tiny_config: Any) -> None:
    finished = run(tiny_config(method="fedsa", rounds=2))
    client = sorted(each.name for each in finished.adapter.iterdir())[1]
    with pytest.raises(FedeltaError, match="one adapter for each client; choose one with --client"):
        fedelta.predict(finished, TEXTS)
    table = fedelta.predict(finished, TEXTS, client=client, probabilities=True)
    expected = plain_probabilities(finished.adapter / client, TEXTS)
    values = torch.tensor(table[["probability_land", "probability_sea", "probability_sky"]].to_numpy())
    assert torch.allclose(values, expected, atol=1e-6)


def test_mistakes_are_one_line_and_write_nothing(
    finished: Run, causal_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, output = str(finished.folder.path), tmp_path / "out.csv"
    good = write_csv(tmp_path / "good.csv", [{"text": "a ship"}])

    def refused(file: Path, *options: str, target: Path = output, result: str = place) -> str:
        line = refusal(capsys, "predict", result, str(file), "-o", str(target), *options)
        assert not output.exists()
        return line

    assert "no such file" in refused(tmp_path / "none.csv")
    assert "no column 'text', found body; set it with --text" in refused(write_csv(tmp_path / "a.csv", [{"body": "a"}]))
    assert "a.csv, line 3: no text in column 'text' (and 1 more row)" in refused(
        write_csv(tmp_path / "a.csv", [{"text": t, "n": 1} for t in ("a", " ", "b", "")])
    )
    (tmp_path / "empty.csv").write_text("")
    assert "the file is empty" in refused(tmp_path / "empty.csv")
    (tmp_path / "header.csv").write_text("text,label\n")
    assert "no rows" in refused(tmp_path / "header.csv")
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n')
    assert "column 'text' holds int64, expected text" in refused(tmp_path / "numbers.jsonl")
    assert "it has a column 'prediction' already" in refused(
        write_csv(tmp_path / "a.csv", [{"text": "a", "prediction": "b"}])
    )
    assert "unknown ending" in refused(good, target=tmp_path / "out.xlsx")
    (tmp_path / "lists.jsonl").write_text('{"text": "a", "tags": ["b"]}\n')
    assert "column 'tags' holds lists or objects; write .jsonl or .parquet" in refused(tmp_path / "lists.jsonl")
    language = run(causal_config(rounds=1))
    for where in (language.folder.path, language.adapter):
        assert "a language model writes texts; use `fedelta generate`" in refused(good, result=str(where))
    assert "no such folder, expected a finished run or an adapter" in refused(good, result=str(tmp_path / "gone"))
    assert command("predict", place, str(good), "-o", str(output)) == 0
    before = output.read_bytes()
    capsys.readouterr()
    assert "already exists; --overwrite replaces it" in refusal(capsys, "predict", place, str(good), "-o", str(output))
    assert output.read_bytes() == before
    assert command("predict", place, str(good), "-o", str(output), "--overwrite", "--probabilities") == 0
    assert output.read_bytes() != before
    (finished.adapter / "adapter_model.safetensors").unlink()
    capsys.readouterr()
    line = refusal(capsys, "predict", place, str(good), "-o", str(tmp_path / "other.csv"))
    assert "no adapter_model.safetensors" in line


def test_whole_numbers_are_classes_however_they_are_written(
    tiny_config: Any, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with texts.open(newline="") as stream:
        rows = [{"text": row["text"], "label": int(row["label"] == "sea")} for row in csv.DictReader(stream)]
    data = {"source": str(write_csv(tmp_path / "numbers.csv", rows)), "max_length": 16}
    finished = run(tiny_config(data=data, partition={"clients": 4}, rounds=1))
    predicted = list(fedelta.predict(finished, TEXTS)["prediction"])
    assert set(predicted) <= {"0", "1"}
    file = write_csv(
        tmp_path / "rows.csv", [{"text": t, "label": f"{p}.0"} for t, p in zip(TEXTS, predicted, strict=True)]
    )
    assert command("predict", str(finished.folder.path), str(file), "-o", str(tmp_path / "out.csv")) == 0
    assert "accuracy 100.00 %" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["[1]", "{", '{"id2label": {"0": "a"}}', '{"id2label": {"0": "a", "7": "b"}}'])
@pytest.mark.parametrize("name", ["labels.json", "task.json", "adapter_config.json"])
def test_a_damaged_file_of_an_adapter_is_named(name: str, content: str, adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / name).write_text(content)
    if name == "task.json" and content.startswith('{"'):
        assert len(fedelta.predict(folder, TEXTS)) == len(TEXTS), "missing keys have their defaults"
        return
    with pytest.raises(FedeltaError, match=str(folder)) as caught:
        fedelta.predict(folder, TEXTS)
    assert len(str(caught.value).splitlines()) == 1
