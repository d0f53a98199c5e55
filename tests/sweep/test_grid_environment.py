"""Environment variables in the paths of a grid: the cells are the same on every machine, wherever its files are."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from encoder import build_bert, write_texts
from fedelta.errors import FedeltaError
from fedelta.files import expand_variables
from fedelta.learning.model.base_model import locate_model
from fedelta.runs.config import parse_config
from fedelta.sweep.cells import Expansion
from fedelta.sweep.grid import Grid, load_grid
from fedelta.sweep.results import read_rows
from fedelta.sweep.runner import Sweep

GRID: dict[str, Any] = {
    "name": "anywhere",
    "seeds": [0],
    "config": {
        "rounds": 1,
        "model": {"name": "${MODELS_OF_THIS_TEST}/bert"},
        "data": {"source": "${DATA_OF_THIS_TEST:-nowhere}/texts.csv", "max_length": 16},
        "partition": {"kind": "iid", "clients": 2},
        "lora": {"target_modules": ["query", "value"]},
        "ranks": {"allocation": "uniform", "high": 2},
        "training": {"steps": 1, "batch_size": 4},
    },
    "axes": {"method": {"mean": {"method": "fedit"}}},
    "experiments": {"one": {"axes": {"method": "all"}, "rows": "method", "show": ["score"]}},
}


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA_OF_THIS_TEST", "MODELS_OF_THIS_TEST"):
        monkeypatch.delenv(name, raising=False)


def write_grid(folder: Path) -> Grid:
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump(GRID | {"output": str(folder)}, sort_keys=False))
    return load_grid(file)


def test_a_grid_reads_its_files_from_the_environment_and_its_cells_do_not_depend_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_bert(tmp_path / "here" / "bert")
    write_texts(tmp_path / "here" / "texts.csv")
    grid = write_grid(tmp_path)
    unset = Expansion(grid).cells(None).cells
    monkeypatch.setenv("DATA_OF_THIS_TEST", str(tmp_path / "here"))
    monkeypatch.setenv("MODELS_OF_THIS_TEST", str(tmp_path / "here"))
    expansion = Expansion(write_grid(tmp_path))
    assert expansion.cells(None).cells == unset
    rows = Sweep(grid, expansion, grid.folder, parallel=1).run()
    assert list(rows) == list(unset)
    assert rows[next(iter(rows))]["failed"] is None
    for content in (read_rows(grid.folder)[next(iter(rows))]["config"], (grid.folder / "grid.yaml").read_text()):
        assert "${DATA_OF_THIS_TEST:-nowhere}/texts.csv" in content
        assert str(tmp_path / "here") not in content


def test_a_variable_without_a_default_that_is_not_set_is_named_before_the_first_cell(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts.csv")
    grid = write_grid(tmp_path)
    grid = grid.model_copy(update={"overrides": {"data.source": str(tmp_path / "texts.csv")}})
    with pytest.raises(FedeltaError, match="environment variable MODELS_OF_THIS_TEST is not set"):
        Sweep(grid, Expansion(grid), grid.folder, parallel=1).run()


def test_a_folder_that_is_not_there_is_no_question_to_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = write_grid(tmp_path).model_copy(update={"overrides": {"data.max_length": 17}})
    monkeypatch.setenv("MODELS_OF_THIS_TEST", "models")
    with pytest.raises(FedeltaError, match=r"data source \./nowhere/texts.csv: no such file"):
        Sweep(grid, Expansion(grid), grid.folder, parallel=1).run()
    with pytest.raises(FedeltaError, match=r"model \./models/bert: no config\.json in that folder"):
        locate_model(parse_config(GRID["config"]).model.name)


def test_variables_are_expanded_as_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_OF_THIS_TEST", "/srv/data")
    assert expand_variables("${DATA_OF_THIS_TEST}/a") == "/srv/data/a"
    assert expand_variables("${DATA_OF_THIS_TEST:-other}/a") == "/srv/data/a"
    assert expand_variables("${MODELS_OF_THIS_TEST:-other}/a") == "./other/a"
    assert expand_variables("${MODELS_OF_THIS_TEST:-../other}/a") == "../other/a"
    assert expand_variables("fancyzhx/ag_news") == "fancyzhx/ag_news"
    monkeypatch.setenv("DATA_OF_THIS_TEST", "")
    assert expand_variables("${DATA_OF_THIS_TEST:-other}/a") == "./other/a", "empty counts as unset"
    for wrong in ("${DATA-OF-THIS-TEST}/a", "${DATA_OF_THIS_TEST"):
        with pytest.raises(FedeltaError, match="expected"):
            expand_variables(wrong)
