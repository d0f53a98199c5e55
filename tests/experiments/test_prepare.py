"""What fills the folders of the experiments: everything but the download itself."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from paths import ROOT

EXPERIMENTS = ROOT / "experiments"
GRIDS = [*sorted(EXPERIMENTS.glob("*/*.yaml"))]


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.setenv("FEDELTA_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FEDELTA_MODELS", str(tmp_path / "models"))
    return importlib.import_module("prepare")


def sources(setting: Any) -> set[tuple[str, str]]:
    """(variable, folder) of every path in a grid that names a variable."""
    if isinstance(setting, dict):
        return {found for value in setting.values() for found in sources(value)}
    if isinstance(setting, str) and setting.startswith("${"):
        variable, folder = setting.removeprefix("${").split("}/")
        return {(variable, folder)}
    return set()


def test_every_folder_that_a_grid_reads_can_be_prepared(prepare: ModuleType) -> None:
    read = {found for grid in GRIDS for found in sources(yaml.safe_load(grid.read_text()))}
    assert {variable for variable, _ in read} == {
        "FEDELTA_DATA:-experiments/data",
        "FEDELTA_MODELS:-experiments/models",
    }
    for variable, folder in read:
        assert folder in (prepare.DATA if variable.startswith("FEDELTA_DATA") else prepare.MODELS)


def test_a_dry_run_says_source_license_and_columns_and_writes_nothing(
    prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "load_split", lambda *_: pytest.fail("a dry run must not fetch anything"))
    prepare.main(["--dry-run"])
    printed = capsys.readouterr().out
    for name in (*prepare.DATA, *prepare.MODELS):
        assert f"\n{name}" in f"\n{printed}"
    assert "fancyzhx/ag_news at its newest revision" in printed
    assert printed.count("  license ") == len(prepare.DATA)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_is_refused(prepare: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prepare.main(["imagenet"])
    assert "unknown name 'imagenet'" in capsys.readouterr().err


SCIENCE = {"question": "Why?", "question_stem": "Why?", "answerKey": "B"}
SCIENCE["choices"] = {"label": ["A", "B"], "text": ["so", "thus"]}  # type: ignore[assignment]
ROWS: dict[str, dict[str, Any]] = {
    "fancyzhx/ag_news": {"text": "a", "label": 1},
    "fancyzhx/dbpedia_14": {"title": "t", "content": "a", "label": 1},
    "nyu-mll/glue": {
        "sentence": "a",
        "sentence1": "a",
        "sentence2": "b",
        "question": "q",
        "label": 1,
        "idx": 0,
    },
    "tuetschek/e2e_nlg": {"meaning_representation": "name[A]", "human_reference": "A is a pub."},
    "openai/gsm8k": {"question": "q", "answer": "1+1=<<1+1=2>>2\n#### 2"},
    "google/boolq": {"question": "is it", "answer": True, "passage": "p"},
    "ybisk/piqa": {"goal": "g", "sol1": "one", "sol2": "two", "label": 1},
    "allenai/social_i_qa": {
        "context": "c",
        "question": "q",
        "answerA": "1",
        "answerB": "2",
        "answerC": "3",
        "label": "3",
    },
    "Rowan/hellaswag": {"ctx": "c", "endings": ["1", "2", "3", "4"], "label": "0"},
    "allenai/winogrande": {"sentence": "A _ b", "option1": "x", "option2": "y", "answer": "2"},
    "allenai/ai2_arc": SCIENCE,
    "allenai/openbookqa": SCIENCE,
}
"""A row of each data set, with the columns that the hub documents."""


def test_every_data_set_becomes_a_folder_with_the_columns_of_the_grids(
    prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "load_split", lambda part, _: [ROWS[part.hub]] * 2)
    prepare.main([*prepare.DATA])
    for name, data in prepare.DATA.items():
        folder = tmp_path / "data" / name
        expected = {f"{file}.parquet" for part in data.parts for file in part.splits}
        assert {file.name for file in folder.iterdir()} == expected
        for file in folder.iterdir():
            table = pq.read_table(file)
            assert tuple(table.column_names) == data.columns
            assert table.num_rows == 2 * len(data.parts)
    assert "ag_news/train: 2 rows, expected 120,000" in capsys.readouterr().err
    prepare.main(["ag_news"])
    assert "ag_news: exists" in capsys.readouterr().out


def test_a_row_with_other_columns_leaves_no_folder(
    prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "load_split", lambda *_: [{"label": 1}])
    with pytest.raises(KeyError):
        prepare.main(["ag_news"])
    assert not (tmp_path / "data" / "ag_news").exists()


def test_references_of_one_meaning_have_one_number(prepare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"meaning_representation": meaning, "human_reference": "r"} for meaning in ("a", "a", "b", "a")]
    monkeypatch.setattr(prepare, "load_split", lambda *_: rows)
    assert [row["mr_id"] for row in prepare.converted(prepare.DATA["e2e_nlg"], "train")] == [0, 0, 1, 0]


def test_a_rationale_has_no_calculator_marks(prepare: ModuleType) -> None:
    row = prepare.gsm8k_row({"question": "q", "answer": "2*3=<<2*3=6>>6.\nSo 6.\n#### 6"})
    assert (row["rationale"], row["final"]) == ("2*3=6.\nSo 6.", "6")


@pytest.mark.parametrize(
    ("hub", "instruction", "output"),
    [
        (
            "google/boolq",
            "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false",
            "true",
        ),
        (
            "ybisk/piqa",
            "Please choose the correct solution to the question: g\n\nSolution1: one\n\nSolution2: two\n\n"
            "Answer format: solution1/solution2",
            "solution2",
        ),
        (
            "allenai/social_i_qa",
            "Please choose the correct answer to the question: c q\n\nAnswer1: 1 Answer2: 2 Answer3: 3\n\n"
            "Answer format: answer1/answer2/answer3",
            "answer3",
        ),
        (
            "Rowan/hellaswag",
            "Please choose the correct ending to complete the given sentence: c\n\n"
            "Ending1: 1 Ending2: 2 Ending3: 3 Ending4: 4\n\nAnswer format: ending1/ending2/ending3/ending4",
            "ending1",
        ),
        (
            "allenai/winogrande",
            "Please choose the correct answer to fill in the blank to complete the given sentence: A _ b\n\n"
            "Option1: x Option2: y Answer format: option1/option2",
            "option2",
        ),
        (
            "allenai/openbookqa",
            "Please choose the correct answer to the question: Why?\n\nAnswer1: so Answer2: thus\n\n"
            "Answer format: answer1/answer2",
            "answer2",
        ),
    ],
)
def test_commonsense_questions_have_the_form_of_llm_adapters(
    prepare: ModuleType, hub: str, instruction: str, output: str
) -> None:
    part = next(part for part in prepare.DATA["commonsense"].parts if part.hub == hub)
    row = part.convert(ROWS[hub])
    assert row["instruction"] == instruction
    assert row["output"] == f"the correct answer is {output}"


def test_the_encoders_are_derived_with_the_recorded_digests(
    prepare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    derive = importlib.import_module("derive_encoders")
    prepare.main([*derive.ENCODERS])
    assert derive.differences(tmp_path / "models") == []
    config = tmp_path / "models" / "minilm-l3-v8k" / "config.json"
    assert json.loads(config.read_text())["num_hidden_layers"] == 3
    config.write_text("{}")
    assert derive.differences(tmp_path / "models") == ["minilm-l3-v8k/config.json"]
    assert "minilm-l6-v8k" in capsys.readouterr().out
