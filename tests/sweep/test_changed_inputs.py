"""Between two sweeps, changed rows or another base are refused, and a damaged file of results is noticed."""

import shutil
from pathlib import Path

import pytest
import yaml

from command import fedelta, refusal
from fedelta.sweep.report.report import provenance
from fedelta.sweep.results import FILE, read_rows, write_rows


@pytest.fixture
def grid(tiny_bert: Path, texts: Path, tmp_path: Path) -> Path:
    """A grid of two cells with rows of its own."""
    rows = Path(shutil.copy(texts, tmp_path / "texts.csv"))
    data = {
        "name": "two",
        "output": str(tmp_path / "results"),
        "seeds": [0],
        "config": {
            "rounds": 1,
            "workers": 1,
            "model": {"name": str(tiny_bert)},
            "ranks": {"allocation": "uniform", "high": 2},
            "data": {"source": str(rows), "max_length": 16},
            "partition": {"clients": 2},
            "training": {"steps": 1, "batch_size": 4},
        },
        "axes": {"method": {"one": {"method": "zero-padding"}, "two": {"method": "fedex"}}},
        "experiments": {"main": {"axes": {"method": "all"}, "rows": "method", "show": ["score"]}},
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def test_a_sweep_with_other_rows_is_refused_and_continues_if_that_is_accepted(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results" / "two"
    assert fedelta("sweep", str(grid), "--where", "method=one", "--parallel", "1") == 0
    before = (folder / FILE).read_bytes()
    rows = tmp_path / "texts.csv"
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join([*lines, *lines[1:21]]))
    capsys.readouterr()
    line = refusal(capsys, "sweep", str(grid), "--parallel", "1")
    assert "main: one, seed 0 has run with other inputs: training rows changed: 187 rows, were 172" in line
    assert line.endswith("or pass --accept-changed-data")
    assert (folder / FILE).read_bytes() == before
    assert fedelta("sweep", str(grid), "--parallel", "1", "--accept-changed-data") == 0
    one, two = sorted(read_rows(folder).values(), key=lambda row: row["method"] == "fedex")
    assert one["accepted"][0] == "training rows changed: 187 rows, were 172"
    assert two["accepted"] == []
    assert "differ in their test rows, training rows, validation rows." in provenance({"1": one, "2": two})
    capsys.readouterr()
    name = next(key for key, row in read_rows(folder).items() if row["method"] != "fedex")
    assert "gave a different result" in refusal(capsys, "sweep", str(grid), "--check", name)


def test_results_are_checked_against_their_digest_when_they_are_read(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results" / "two"
    assert fedelta("sweep", str(grid), "--where", "method=one", "--parallel", "1") == 0
    rows = read_rows(folder)
    (key,) = rows
    whole = (folder / FILE).read_bytes()
    write_rows(folder, {key: rows[key] | {"test": rows[key]["test"] | {"accuracy": 1.0}}})
    capsys.readouterr()
    assert f"cell {key} is not what was written" in refusal(capsys, "report", str(folder))
    for damaged in (whole[:-100], whole[:4], b"", b"PAR1" * 30, bytes(len(whole))):
        (folder / FILE).write_bytes(damaged)
        line = refusal(capsys, "report", str(folder))
        assert str(folder / FILE) in line
        assert len(line) < 300
    write_rows(folder, rows)
    for name, text in {"deep": "a: " + "[" * 100_000, "list": "- a", "text": "\x00"}.items():
        (folder / "grid.yaml").write_text(text)
        assert "grid.yaml" in refusal(capsys, "report", str(folder)), name
        assert "grid.yaml" in refusal(capsys, "sweep", str(folder / "grid.yaml")), name
