"""Files as public data sets and office programs write them: read as they are meant, or refused for a stated reason."""

import csv
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from command import fedelta, refusal
from encoder import FILLER, TOPICS
from fedelta.errors import FedeltaError
from fedelta.learning.data import DataSettings
from fedelta.learning.data.table import DataWarning
from fedelta.learning.shards import read_splits
from fedelta.learning.tasks import Classification, Completion, Regression

RUN = ["rounds=1", "workers=1", "method=fedit", "lora.alpha=8", "ranks={allocation: uniform, high: 2}"]
RUN += ["training={steps: 1, batch_size: 4}", "partition.clients=2"]


def sentences(number: int) -> list[str]:
    rng = random.Random(0)
    texts = []
    for i in range(number):
        words = rng.choices(FILLER, k=7) + rng.choices(list(TOPICS.values())[i % 3], k=3)
        rng.shuffle(words)
        texts.append(" ".join(words))
    return texts


def table(rows: Sequence[Sequence[object]], delimiter: str = ",") -> str:
    content = io.StringIO()
    csv.writer(content, delimiter=delimiter).writerows(rows)
    return content.getvalue()


@pytest.fixture
def run(tiny_bert: Path, tmp_path: Path) -> Any:
    """A function that runs `fedelta run` on a source, and returns the run's result."""
    config = tmp_path / "run.yaml"

    def start(source: Path, *options: str, model: Path = tiny_bert) -> dict[str, Any]:
        config.write_text(f"name: r\noutput: {tmp_path / 'runs'}\n")
        code = fedelta(
            "run", str(config), f"data.source={source}", "data.max_length=24", f"model.name={model}", *RUN, *options
        )
        assert code == 0
        return json.loads((tmp_path / "runs" / "r" / "result.json").read_text())

    return start


def test_a_regression_on_what_excel_writes_in_germany(run: Any, tmp_path: Path, capsys: Any) -> None:
    rows = [("Text", "Bewertung"), *((f"{text} über", f"{i % 5},{i % 9}") for i, text in enumerate(sentences(60)))]
    file = tmp_path / "umfrage.CSV"
    file.write_bytes(table(rows, ";").encode("cp1252"))
    settings = DataSettings(source=str(file), text="Text", label="Bewertung")
    with pytest.warns(DataWarning):
        splits, _ = read_splits(settings, Regression())
    expected = {f"{text} über": i % 5 + (i % 9) / 10 for i, text in enumerate(sentences(60))}
    assert {row["Text"]: row["Bewertung"] for split in splits.values() for row in split} == expected
    result = run(file, "data.text=Text", "data.label=Bewertung", "task=regression")
    assert result["classes"] == []
    said = capsys.readouterr().err
    for line in ("read as cp1252", "cells are separated by ';'", "decimal commas, such as 0,0"):
        assert line in said


def test_cola_has_no_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.tsv"
    texts = [('"' if i % 7 == 0 else "") + text for i, text in enumerate(sentences(60))]
    file.write_text("".join(f"gj04\t{i % 2}\t{'' if i % 2 else '*'}\t{text}\n" for i, text in enumerate(texts)))
    line = refusal(capsys, "run", f"data.source={file}", f"output={tmp_path}")
    assert "no column 'text' in split train, found gj04, 0, *" in line
    assert "without a header line, name the columns with data.columns" in line
    settings = DataSettings(source=str(file), columns=("source", "label", "mark", "text"))
    splits, names = read_splits(settings, Classification())
    assert names == ["0", "1"]
    assert sorted(text for split in splits.values() for text in split["text"]) == sorted(texts)


def test_sst2_has_a_header_and_no_labels_in_its_test_split(tmp_path: Path) -> None:
    header, texts = "sentence\tlabel\n", sentences(80)
    (tmp_path / "train.tsv").write_text(header + "".join(f"{t} \t{i % 2}\n" for i, t in enumerate(texts[:60])))
    (tmp_path / "dev.tsv").write_text(header + "".join(f"{t} \t{i % 2}\n" for i, t in enumerate(texts[60:])))
    (tmp_path / "test.tsv").write_text("index\tsentence\n" + "".join(f"{i}\t{t}\n" for i, t in enumerate(texts)))
    settings = DataSettings(source=str(tmp_path), text="sentence")
    with pytest.raises(FedeltaError, match="no column 'label' in split test, found index, sentence"):
        read_splits(settings, Classification())
    settings = settings.model_copy(update={"splits": {"test": "validation", "validation": None}})
    assert read_splits(settings, Classification())[0]["test"].num_rows == 20


def test_quotes_in_mrpc_are_part_of_the_text(tmp_path: Path) -> None:
    texts = [f'"{text} , " he said' if i % 3 == 0 else f'"{text}' for i, text in enumerate(sentences(60))]
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    lines = [f'{i % 2}\t{i}\t{i + 1}\t{text}\tnothing "\n' for i, text in enumerate(texts)]
    (tmp_path / "msr.tsv").write_text(header + "".join(lines))
    settings = DataSettings(source=str(tmp_path / "msr.tsv"), text=("#1 String", "#2 String"), label="Quality")
    splits, names = read_splits(settings, Classification())
    assert names == ["0", "1"]
    assert sorted(text for split in splits.values() for text in split["#1 String"]) == sorted(texts)


def test_pairs_of_snli_without_a_label_are_left_out(run: Any, tmp_path: Path, capsys: Any) -> None:
    labels = ["entailment", "neutral", "contradiction", "-"]
    rows = [
        {"annotator_labels": ["neutral"], "gold_label": labels[i % 4], "sentence1": text, "sentence2": text[::-1]}
        for i, text in enumerate(sentences(80))
    ]
    (tmp_path / "snli").mkdir()
    for name, part in {"train": rows[:60], "dev": rows[60:70], "test": rows[70:]}.items():
        (tmp_path / "snli" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    result = run(tmp_path / "snli", "data.text=[sentence1, sentence2]", "data.label=gold_label")
    assert result["classes"] == ["contradiction", "entailment", "neutral"]
    assert "15 rows of train, 2 rows of validation, 3 rows of test without a label left out" in capsys.readouterr().err


ALPACA: dict[str, Any] = {"prompt": "{instruction} {input} :", "completion": " {output}"}


def alpaca(number: int) -> list[dict[str, str]]:
    return [
        {
            "instruction": f"say {text}",
            "input": text if i % 3 == 0 else "",
            "output": f"{'007' if i % 2 else '1e5'} {i}",
        }
        for i, text in enumerate(sentences(number))
    ]


@pytest.mark.parametrize("form", ["csv", "json"])
def test_alpaca_has_empty_inputs(form: str, tmp_path: Path, run: Any, causal: Any) -> None:
    rows, file = alpaca(60), tmp_path / f"alpaca.{form}"
    names = ["instruction", "input", "output"]
    file.write_text(json.dumps(rows) if form == "json" else table([names, *([row[n] for n in names] for row in rows)]))
    splits, _ = read_splits(DataSettings(source=str(file)), Completion(**ALPACA))
    read = [dict(row) for split in splits.values() for row in split]
    assert sorted(read, key=lambda row: row["output"]) == sorted(rows, key=lambda row: row["output"])
    task = json.dumps({"kind": "completion", **ALPACA})
    result = run(file, f"task={task}", "lora.target_modules=all-linear", model=causal("llama"))
    assert result["test"]["loss"] > 0


def test_the_messages_of_sharegpt_are_not_text(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    (tmp_path / "x.json").write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(40)]))
    task = Completion(prompt="{id}", completion="{conversations}")
    with pytest.raises(FedeltaError, match="column 'conversations' holds lists or objects, expected text or numbers"):
        read_splits(DataSettings(source=str(tmp_path / "x.json")), task)


def test_the_sites_of_a_column_are_the_clients_of_a_run(run: Any, tmp_path: Path, capsys: Any) -> None:
    sites = ["Charité", "Kiel", "LMU/München"]
    rows = [(t, list(TOPICS)[i % 3], sites[i % 3]) for i, t in enumerate(sentences(60))]
    rows.append((sentences(61)[60], "sea", "Praxis Dr. No"))
    file = tmp_path / "x.csv"
    file.write_text(table([("text", "label", "site"), *rows]))
    result = run(
        file, "partition={kind: natural, by: site}", "data.split_seed=1", "data.test=0.05", "data.validation=0.1"
    )
    assert sum(result["clients"].values()) > 40
    assert set(result["clients"]) == {"Charite", "Kiel", "LMU-Munchen", "Praxis-Dr-No"}
    assert result["clients"]["Praxis-Dr-No"] == 1
    said = capsys.readouterr().err
    assert "1 client with one row hold none out: Praxis-Dr-No" in said
    assert set(json.loads((tmp_path / "runs/r/rounds.jsonl").read_text())["clients"]) <= set(result["clients"])
