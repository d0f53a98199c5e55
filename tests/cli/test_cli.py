"""The command line: tables, plots, and one clear line with exit code 2 for every mistake."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from command import fedelta, refusal
from fedelta import __version__
from fedelta.runs.runner import run


@pytest.fixture
def config(tiny_config: Any, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config().dump()))
    return path


def test_run_ends_with_a_table_a_plot_a_page_and_an_adapter(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedelta("run", str(config), "method=fedex") == 0
    printed = capsys.readouterr().out
    assert "fedex" in printed
    folder = tmp_path / "runs" / "tiny"
    for name in ("score.png", "score.svg", "report.html", "table.json", "adapter/adapter_model.safetensors"):
        assert (folder / name).stat().st_size > 0
    assert str(folder / "report.html") in printed
    assert (folder / "score.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob(".*")), "no temporary file is left"


def test_compare_shares_data_and_weights_and_reports_the_spread(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", str(config), "--methods", "zero-padding,replication,fedex", "--seeds", "2"]
    assert fedelta(*arguments) == 0
    printed = capsys.readouterr().out
    assert "±" in printed
    folder = tmp_path / "runs" / "tiny-compare"
    rows = json.loads((folder / "table.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["zero-padding", "replication", "fedex"]
    assert all(row["seeds"] == 2 and row["score_std"] is not None for row in rows)
    first = [json.loads((folder / f"{m}-seed1" / "rounds.jsonl").read_text().splitlines()[0]) for m in
             ("zero-padding", "replication", "fedex")]  # fmt: skip
    assert len({record["train_loss"] for record in first}) == 1, "same data, same initial weights"
    before = (folder / "table.json").read_bytes()
    assert fedelta(*arguments, "--resume") == 0
    assert (folder / "table.json").read_bytes() == before
    (folder / "report.html").unlink()
    (folder / "table.json").unlink()
    (folder / "fedex-seed7").mkdir()
    assert fedelta("report", str(folder)) == 0
    assert (folder / "table.json").read_bytes() == before
    page = (folder / "report.html").read_text()
    assert page.count("<details>") == 7
    assert "<svg" in page


def test_methods_lists_every_method_with_its_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert fedelta("methods") == 0
    printed = capsys.readouterr().out
    for name in ("fedit", "ffa", "zero-padding", "replication", "fedex"):
        assert name in printed
    assert "2410.09432" in printed


def test_export_writes_an_adapter_and_a_merged_model(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fedelta("run", str(config), "method=fedex")
    out = ["--adapter", str(tmp_path / "a"), "--merged", str(tmp_path / "m")]
    assert fedelta("export", str(tmp_path / "runs" / "tiny"), *out) == 0
    assert "rank" in capsys.readouterr().out
    run_adapter = tmp_path / "runs" / "tiny" / "adapter" / "adapter_model.safetensors"
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == run_adapter.read_bytes()
    assert (tmp_path / "m" / "model.safetensors").exists()


MISTAKES = {
    "unknown method": (["method=replicate"], "unknown method 'replicate'; did you mean 'replication'"),
    "rank 0": (["ranks.high=0"], "ranks.high: input should be greater than or equal to 1, found 0"),
    "label column": (["data.label=topic"], "no column 'topic' in split train"),
    "missing data file": (["data.source=nowhere.csv"], "data source nowhere.csv: no such file"),
    "missing model": (["model.name=./nowhere"], "model ./nowhere: no config.json in that folder"),
    "empty shard": (["partition.kind=iid", "partition.clients=400"], "400 clients, but only 172 rows"),
    "weights": (["federation.weighting=[1, 2]"], "has 2 weights, expected one for each of 4 clients"),
    "negative weight": (["federation.weighting=[1, 2, 3, -1]"], "must be ≥ 0"),
    "ranks": (["ranks.per_client=[1, 2]"], "has 2 ranks, expected one for each of 4 clients"),
    "unknown key": (["trainig.steps=1"], "unknown key 'trainig'; did you mean 'training'"),
    "equal-rank method": (["method=fedit"], "method fedit needs equal ranks"),
    "target modules": (["lora.target_modules=[nothing]"], "lora.target_modules"),
    "modules to save": (["lora.modules_to_save=[nothing]"], "the model has no module 'nothing'"),
    "texts too long for the model": (["data.max_length=64"], "data.max_length is 64, but the model takes 32 tokens"),
    "more clients than sampled": (["federation.min_clients=9"], "min_clients is 9, but a round has 4 of 4 clients"),
    "split too large": (["data.test=0.999"], "data.test=0.999 of 240 rows leaves too few"),
    "split name": (["data.splits={test: exam}"], "has no split 'exam', found train"),
    "negative seed": (["data.split_seed=-3"], "data.split_seed: input should be greater than or equal to 0"),
    "brackets": (["data.source=./x[/b]"], "data source ./x[/b]: no such file or folder"),
    "losses without held-out rows": (["ranks.allocation=loss", "data.client_validation=0"], "data.client_validation"),
    "output is a file": (["output=TEXTS"], "texts.csv"),
    "output cannot be made": (["output=/proc/nowhere"], "/proc/nowhere"),
    "text of numbers": (["data.text=label", "data.label=author", "data.source=NUMBERS"], "holds int64, expected text"),
    "damaged weights": (["model.name=DAMAGED"], "DAMAGED/model.safetensors"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_files(
    mistake: str,
    config: Path,
    tmp_path: Path,
    texts: Path,
    tiny_bert: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides, expected = MISTAKES[mistake]
    places = {"TEXTS": texts, "NUMBERS": tmp_path / "n.jsonl", "DAMAGED": tmp_path / "d"}
    places["NUMBERS"].write_text("".join(f'{{"label": {i}, "author": "{"xy"[i % 2]}"}}\n' for i in range(40)))
    shutil.copytree(tiny_bert, places["DAMAGED"])
    weights = places["DAMAGED"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    capsys.readouterr()
    for name, place in places.items():
        overrides = [override.replace(name, str(place)) for override in overrides]
        expected = expected.replace(name, str(place))
    before = sorted(tmp_path.rglob("*"))
    assert expected in refusal(capsys, "run", str(config), *overrides)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"\x7fELF\x00\xff\xfe", "not a text file"), (b"a: [1", "line 1, column 6"), (b"[]", "holds a list")],
)
def test_a_broken_configuration_is_one_line(
    content: bytes, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    assert expected in refusal(capsys, "run", str(tmp_path / "x.yaml"))


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ("replication,replication", "expected each once"),
        ("", "unknown method ''"),
        ("replication,,fedex", "unknown method ''"),
    ],
)
def test_mistakes_in_methods_are_one_line(
    methods: str, expected: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refusal(capsys, "compare", str(config), "--methods", methods)
    assert not (tmp_path / "runs").exists()


def test_a_run_that_failed_in_its_first_round_does_not_block_the_corrected_one(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedelta("run", str(config), "training.learning_rate=1e30") == 2
    assert "round 0: 0 usable updates" in capsys.readouterr().err.strip().splitlines()[-1]
    assert fedelta("run", str(config)) == 0


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_damaged_result_is_one_line(
    content: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fedelta("run", str(config), "rounds=1")
    capsys.readouterr()
    folder = tmp_path / "runs" / "tiny"
    (folder / "result.json").write_text(content)
    assert "result.json is damaged" in refusal(capsys, "report", str(folder))


def test_missing_lines_of_the_run_log_are_reported(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fedelta("run", str(config))
    capsys.readouterr()
    (tmp_path / "runs" / "tiny" / "rounds.jsonl").write_text("")
    assert "rounds.jsonl has 0 lines, but the checkpoint has 3" in refusal(capsys, "run", str(config), "--resume")


def test_two_exports_into_one_folder_are_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fedelta("run", str(config), "rounds=1")
    capsys.readouterr()
    same = str(tmp_path / "x")
    assert "expected two places" in refusal(
        capsys, "export", str(tmp_path / "runs" / "tiny"), "--adapter", same, "--merged", same
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_says_that_finished_rounds_are_kept_and_fails(
    number: signal.Signals, config: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fedelta.cli", "run", str(config), "rounds=500"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    rounds = tmp_path / "runs" / "tiny" / "rounds.jsonl"
    while process.poll() is None and not (rounds.exists() and rounds.stat().st_size):
        time.sleep(0.05)
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "--resume continues from them" in printed


def test_a_missing_configuration_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "configuration nowhere.yaml: No such file" in refusal(capsys, "run", "nowhere.yaml")


def test_a_mistake_in_compare_stops_it_before_anything_runs(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, "compare", str(config), "--methods", "replication,fedx")
    assert "unknown method 'fedx'; did you mean 'fedex'" in line
    assert not (tmp_path / "runs").exists()


def test_a_second_run_in_the_same_folder_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fedelta("run", str(config))
    capsys.readouterr()
    assert "holds a run already" in refusal(capsys, "run", str(config))


def test_a_checkpoint_of_another_config_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fedelta("run", str(config))
    capsys.readouterr()
    assert "seed was 0, now 1" in refusal(capsys, "run", str(config), "seed=1", "--resume")


def test_a_truncated_checkpoint_is_refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fedelta("run", str(config))
    capsys.readouterr()
    for file in (tmp_path / "runs" / "tiny" / "checkpoint").iterdir():
        file.write_bytes(file.read_bytes()[:-7])
    assert "state.safetensors" in refusal(capsys, "run", str(config), "--resume")
    assert "state.safetensors" in refusal(
        capsys, "export", str(tmp_path / "runs" / "tiny"), "--adapter", str(tmp_path / "a")
    )
    assert not (tmp_path / "a").exists()


def test_usage_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such option" in refusal(capsys, "run", "--nonsense")
    assert "pass --adapter OUT" in refusal(capsys, "export", "somewhere")
    assert "no finished run here" in refusal(capsys, "report", "somewhere")


def test_the_installed_command_exits_with_code_2(config: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedelta.cli", "run", str(config), "method=none-such"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown method 'none-such'")
    assert done.stderr.count("\n") == 1


def test_without_a_terminal_a_run_prints_a_line_for_each_round(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedelta("run", str(config), "rounds=2") == 0
    begin, *rounds = capsys.readouterr().err.splitlines()
    assert begin.endswith(" replication, seed 0: 2 rounds")
    assert len(rounds) == 2
    for number, line in enumerate(rounds, 1):
        assert f" round {number} of 2: validation accuracy " in line


def test_help_says_what_positional_arguments_are(capsys: pytest.CaptureFixture[str]) -> None:
    for command, expected in (("run", "settings; without a"), ("export", "Folder of a run."), ("sweep", "the grid")):
        assert fedelta(command, "--help") == 0
        assert expected in capsys.readouterr().out


def test_the_version_is_an_option_and_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argument in ("--version", "version"):
        assert fedelta(argument) == 0
        assert capsys.readouterr().out == f"{__version__}\n"


def test_an_unknown_command_has_one_suggestion_or_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "rnu").count("'run'") == 1
    assert refusal(capsys, "bogus") == "error: No such command 'bogus'."


def test_config_lists_keys_sections_and_options_of_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert fedelta("config") == 0
    assert "training.learning_rate = 0.001" in capsys.readouterr().out
    assert fedelta("config", "training.steps") == 0
    assert capsys.readouterr().out.startswith("training.steps = null\n    whole number ≥ 1 or null: number of")
    assert fedelta("config", "fedex") == 0
    assert "method.residual = exact" in capsys.readouterr().out
    assert fedelta("config", "--json") == 0
    assert json.loads(capsys.readouterr().out)["properties"]["rounds"]["minimum"] == 1


def test_a_report_of_runs_that_are_not_of_one_comparison_is_refused(
    tiny_config: Any, causal_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    one = run(tiny_config(name="one", rounds=1))
    parent = one.folder.path.parent
    run(tiny_config(name="two", rounds=1, method="flora"))
    assert fedelta("report", str(parent)) == 0
    run(causal_config(name="zoo", rounds=1, output=str(parent)))
    capsys.readouterr()
    line = refusal(capsys, "report", str(parent))
    assert "one and zoo differ in task, data, test rows" in line
    assert "name the folder of one run or of one comparison" in line
