"""The public API: exported names, data and models in memory, and rounds as a table."""

import doctest
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fedelta
from fedelta.runs import api
from fedelta.runs.runner import run

NAMES = [
    *("Config", "FedeltaError", "Progress", "Run", "aggregate_folders", "compare", "configure", "export"),
    *("generate", "load_config", "make_method", "open_run", "predict", "run", "__version__"),
]


def test_exported_names_are_complete_and_importable() -> None:
    assert sorted(fedelta.__all__) == sorted(NAMES)
    assert set(dir(fedelta)) == set(fedelta.__all__)
    for name in NAMES:
        assert getattr(fedelta, name) is not None
    assert fedelta.Progress() is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fedelta.nothing  # noqa: B018


def test_importing_fedelta_loads_no_heavy_package() -> None:
    code = "import sys, fedelta; sys.exit(bool({'torch', 'transformers', 'pandas', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_docstring_examples_pass() -> None:
    assert doctest.testmod(api).failed == 0
    assert doctest.testmod(api).attempted >= 3


@pytest.fixture
def rows(texts: Path) -> list[dict[str, Any]]:
    return pandas.read_csv(texts).to_dict("records")


def settings(tiny_config: Any, **changes: Any) -> dict[str, Any]:
    return tiny_config(**changes).dump()


def test_rows_in_memory_and_in_a_file_give_equal_results(tiny_config: Any, rows: list[dict[str, Any]]) -> None:
    from_file = fedelta.run(settings(tiny_config, name="file"))
    from_list = fedelta.run(settings(tiny_config, name="list"), data=rows)
    from_dataset = fedelta.run(settings(tiny_config, name="set"), data={"train": datasets.Dataset.from_list(rows)})
    for other in (from_list, from_dataset):
        pandas.testing.assert_frame_equal(from_file.rounds, other.rounds)
        assert from_file.test == other.test


def test_runs_of_a_model_in_memory_are_equal_and_train_copies(tiny_config: Any, tiny_bert: Path) -> None:
    config = settings(tiny_config, name="folder", lora={"alpha": 8, "modules_to_save": ["classifier", "pooler"]})
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one = fedelta.run(config, name="memory", model=model, tokenizer=tokenizer)
    two = fedelta.run(config, name="again", model=model, tokenizer=tokenizer)
    pandas.testing.assert_frame_equal(one.rounds, two.rounds)
    assert one.config.model.name.startswith("memory:")
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name]), "a run must train a copy of the model"


def test_a_run_has_a_table_of_rounds_scores_and_an_adapter(tiny_config: Any, tmp_path: Path) -> None:
    run = fedelta.run(settings(tiny_config), method="fedex", rounds=2, training={"steps": 1})
    assert list(run.rounds.index) == [1, 2]
    assert {"train_loss", "validation_accuracy", "bytes_up", "deviation"} <= set(run.rounds.columns)
    assert run.rounds["bytes_up"].gt(0).all()
    assert (run.adapter / "adapter_model.safetensors").exists()
    assert 0 <= run.test["accuracy"] <= 1
    run.export(adapter=tmp_path / "out")
    assert (tmp_path / "out" / "adapter_config.json").exists()
    fedelta.export(run.folder.path, adapter=tmp_path / "cut", rank=1)
    assert (tmp_path / "cut").is_dir()
    again = fedelta.open_run(run.folder.path)
    pandas.testing.assert_frame_equal(again.rounds, run.rounds)


def test_compare_orders_runs_by_method_and_seed(tiny_config: Any) -> None:
    runs = fedelta.compare(
        settings(tiny_config), ["fedit", "fedex"], seeds=2, ranks={"allocation": "uniform", "high": 2}
    )
    assert [(run.config.method.name, run.config.seed) for run in runs] == [
        ("fedit", 0),
        ("fedit", 1),
        ("fedex", 0),
        ("fedex", 1),
    ]


def test_objects_of_another_process_must_be_passed_again(tiny_config: Any) -> None:
    with pytest.raises(fedelta.FedeltaError, match="pass the same data again"):
        fedelta.run(settings(tiny_config, data={"source": "memory:0123456789abcdef", "max_length": 16}))
    with pytest.raises(fedelta.FedeltaError, match="pass the same model again"):
        fedelta.run(settings(tiny_config, model={"name": "memory:0123456789abcdef"}))


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ({"data": []}, "split train is a list, expected a datasets.Dataset, a DataFrame or a list"),
        ({"data": {"train": 3}}, "split train is a int"),
        ({"tokenizer": object()}, "without its model"),
        ({"model": object()}, "needs its tokenizer"),
        ({"rouns": 3}, "unknown key 'rouns'; did you mean 'rounds'"),
    ],
)
def test_invalid_arguments_raise_one_line(objects: dict[str, Any], words: str, tiny_config: Any) -> None:
    with pytest.raises(fedelta.FedeltaError, match=words) as caught:
        fedelta.configure(settings(tiny_config), **objects)
    assert "\n" not in str(caught.value)


def test_another_tokenizer_makes_another_model(tiny_config: Any, tiny_bert: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    one, two = (AutoTokenizer.from_pretrained(tiny_bert) for _ in range(2))
    two.add_tokens(["lighthouse"])
    config = settings(tiny_config)
    names = [fedelta.configure(config, model=model, tokenizer=each).model.name for each in (one, one, two)]
    assert names[0] == names[1] != names[2]


def test_a_model_in_memory_must_fit_what_is_asked_of_it(tiny_config: Any, tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    small = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    with pytest.raises(fedelta.FedeltaError, match="has 2 outputs, but the data need 3"):
        fedelta.run(settings(tiny_config), model=small, tokenizer=tokenizer)
    with pytest.raises(fedelta.FedeltaError, match="quantization: 4bit is for models that a run loads"):
        fedelta.run(settings(tiny_config), model=small, tokenizer=tokenizer, **{"model.quantization": "4bit"})


def test_a_comparison_refuses_a_finished_folder_before_it_trains(tiny_config: Any) -> None:
    equal = {"allocation": "uniform", "high": 2}
    fedelta.compare(settings(tiny_config), ["fedex"], ranks=equal)
    with pytest.raises(fedelta.FedeltaError, match="holds a run already"):
        fedelta.compare(settings(tiny_config), ["fedit", "fedex"], ranks=equal)
    folder = tiny_config().folder.with_name("tiny-compare")
    assert not (folder / "fedit-seed0").exists()


def test_an_export_says_what_to_write(tiny_config: Any) -> None:
    run = fedelta.run(settings(tiny_config), rounds=1)
    with pytest.raises(fedelta.FedeltaError, match="neither an adapter nor a merged model"):
        run.export()


def test_a_run_is_opened_by_a_text_and_shown_in_one_line(tiny_config: Any) -> None:
    trained = run(tiny_config(rounds=1))
    opened = fedelta.open_run(str(trained.folder.path))
    assert opened.test == trained.test
    shown = repr(opened)
    assert shown.startswith("Run(tiny: ")
    assert "1 round, test loss " in shown
    assert shown.endswith(f"{trained.folder.path})")
    assert len(shown) < 200 + len(str(trained.folder.path))


def test_python_runs_the_package() -> None:
    done = subprocess.run([sys.executable, "-m", "fedelta", "version"], capture_output=True, text=True, check=True)
    assert done.stdout == fedelta.__version__ + "\n"
