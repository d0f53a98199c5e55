"""Generated answers are kept in `generations.jsonl`, and the initial model can be evaluated before the first round."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedelta
from causal import TASK
from fedelta.errors import FedeltaError
from fedelta.federation import run_folder
from fedelta.runs import before
from fedelta.runs.comparison import comparison_configs, run_comparison
from fedelta.runs.runner import Run, open_run, run

GENERATES = TASK | {"generate": {"max_new_tokens": 4}, "answer": "text"}
EXACT = GENERATES | {"metric": "exact"}
BEFORE = {"evaluation": {"before": True}}


def lines(finished: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in finished.folder.generations_file.read_text().splitlines()]


def test_each_answer_of_each_evaluation_is_a_line(causal_config: Any) -> None:
    finished = run(causal_config(task=EXACT, **BEFORE))
    found = lines(finished)
    assert list(dict.fromkeys(line["round"] for line in found)) == ["before", 0, 1, "test"]
    tests = [line for line in found if line["round"] == "test"]
    assert finished.test["exact"] == pytest.approx(sum(line["exact"] for line in tests) / len(tests), abs=1e-12)
    assert finished.result["test_before"]["exact"] == pytest.approx(
        sum(line["exact"] for line in found if line["round"] == "before") / len(tests), abs=1e-12
    )
    for number, record in enumerate(finished.records):
        own = [line["exact"] for line in found if line["round"] == number]
        assert record["validation"]
        assert record["validation"]["exact"] == pytest.approx(sum(own) / len(own), abs=1e-12)
    assert {line["split"] for line in found if line["round"] in (0, 1)} == {"validation"}
    first = tests[0]
    assert first["prompt"].startswith("<s> the color of ")
    assert first["references"][0].endswith(" .")
    assert [line["row"] for line in tests] == sorted(line["row"] for line in tests)
    table = finished.generations
    assert list(table["answer"]) == [line["answer"] for line in found]
    assert list(open_run(finished.folder.path).generations["answer"]) == list(table["answer"])


def test_a_run_that_generates_nothing_has_no_file(tiny_config: Any) -> None:
    finished = run(tiny_config(rounds=1, evaluation={"before": True}))
    assert not finished.folder.generations_file.exists()
    assert finished.generations.empty
    assert "generations_digest" not in finished.result
    assert set(finished.result["test_before"]) == set(finished.test)


def test_the_initial_model_is_the_base_model_and_its_evaluation_changes_no_round(causal_config: Any) -> None:
    with_it = run(causal_config(name="with", task=GENERATES, **BEFORE))
    without = run(causal_config(name="without", task=GENERATES))
    assert with_it.folder.rounds_file.read_bytes() == without.folder.rounds_file.read_bytes()
    assert with_it.test == without.test
    assert "test_before" not in without.result
    assert [line for line in lines(with_it) if line["round"] == "test"] == lines(without)
    untrained = run(causal_config(name="untrained", task=GENERATES, training={"learning_rate": 1e-30, "batch_size": 8}))
    assert with_it.result["test_before"] == pytest.approx(dict(untrained.test), abs=1e-6)


@pytest.mark.parametrize("crash", [1, 2, 3])
def test_a_crashed_run_resumes_to_the_same_lines(
    crash: int, causal_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The crash comes after the lines of an evaluation and before the checkpoint that makes them permanent."""
    straight = run(causal_config(name="straight", task=EXACT, **BEFORE))
    config = causal_config(name="crashed", task=EXACT, **BEFORE)
    calls, save = [0], run_folder.save_checkpoint

    def fail(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == crash:
            raise KeyboardInterrupt
        save(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "save_checkpoint", fail)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    before._last.clear()  # As in a new process.
    resumed = run(config, resume=True)
    for file in ("generations_file", "rounds_file", "result_file"):
        assert getattr(resumed.folder, file).read_bytes() == getattr(straight.folder, file).read_bytes(), file


def test_a_run_that_is_killed_at_a_random_moment_resumes_to_the_same_answers(
    causal_config: Any, tmp_path: Path
) -> None:
    straight = run(causal_config(name="straight", task=EXACT, rounds=12, **BEFORE))
    killed = causal_config(name="killed", task=EXACT, rounds=12, workers=2, **BEFORE)
    file = tmp_path / "killed.yaml"
    file.write_text(yaml.safe_dump(killed.dump()))
    command = [sys.executable, "-m", "fedelta.cli", "run", str(file), "--resume"]
    answers = killed.folder / "generations.jsonl"
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (answers.exists() and b'"round": 2' in answers.read_bytes()):
        time.sleep(0.002)
    time.sleep(random.Random().uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed.folder / "result.json").exists()
    subprocess.run(command, check=True, capture_output=True)
    for name in ("generations.jsonl", "rounds.jsonl", "result.json"):
        assert (killed.folder / name).read_bytes() == (straight.folder.path / name).read_bytes(), name


def test_a_crash_after_the_last_answers_and_a_half_written_line_lose_nothing(causal_config: Any) -> None:
    config = causal_config(task=GENERATES, **BEFORE)
    finished = run(config)
    files = [finished.folder.generations_file, finished.folder.result_file]
    expected = [file.read_bytes() for file in files]
    finished.folder.result_file.unlink()
    with files[0].open("a") as stream:
        stream.write('{"round": "test", "sp')
    run(config, resume=True)
    assert [file.read_bytes() for file in files] == expected
    # A finished run is left as it is.
    run(config, resume=True)
    assert [file.read_bytes() for file in files] == expected


def test_an_edited_answer_is_noticed(causal_config: Any) -> None:
    config = causal_config(task=EXACT)
    finished = run(config)
    file = finished.folder.generations_file
    whole = file.read_text()
    file.write_text(whole.replace('"row": 0', '"row": 1', 1))
    with pytest.raises(FedeltaError, match=r"generations.jsonl was changed after the run"):
        open_run(finished.folder.path)
    finished.folder.result_file.unlink()
    with pytest.raises(FedeltaError, match=r"generations.jsonl is not what the run wrote"):
        run(config, resume=True)


def test_more_rounds_replace_the_answers_of_the_former_final_model(causal_config: Any) -> None:
    run(causal_config(name="more", task=EXACT, **BEFORE))
    longer = run(causal_config(name="more", task=EXACT, rounds=3, **BEFORE), resume=True)
    straight = run(causal_config(name="straight", task=EXACT, rounds=3, **BEFORE))
    assert longer.folder.generations_file.read_bytes() == straight.folder.generations_file.read_bytes()
    assert longer.result["test_before"] == straight.result["test_before"]


def test_answers_of_a_method_without_a_global_model_name_the_client(causal_config: Any) -> None:
    task = GENERATES | {"generate": {"max_new_tokens": 4, "limit": 3}}
    finished = run(causal_config(method="fedsa", rounds=1, task=task, **BEFORE))
    found = lines(finished)
    clients = sorted(each.name for each in finished.adapter.iterdir())
    by_client = {
        client: [line["row"] for line in found if line["round"] == "test" and line.get("client") == client]
        for client in clients
    }
    assert all(len(rows) == 3 for rows in by_client.values())
    assert len(found) == 3 * len(clients) + 3
    assert all("client" not in line for line in found if line["round"] == "before")


def test_a_comparison_computes_the_initial_model_once_for_each_seed(
    causal_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before._last.clear()
    tests = []
    evaluate = before.Evaluator.evaluate

    def counted(self: Any, state: Any, examples: Any, split: str, *rest: Any, **options: Any) -> Any:
        tests.append(split)
        return evaluate(self, state, examples, split, *rest, **options)

    monkeypatch.setattr(before.Evaluator, "evaluate", counted)
    ranks = {"allocation": "uniform", "high": 4}
    configs = comparison_configs(
        causal_config(rounds=1, task=GENERATES, ranks=ranks, **BEFORE), ("fedit", "fedex", "fed-sb"), 2
    )
    runs = run_comparison(configs, False, None)
    assert tests.count("test") == 6 + 2
    monkeypatch.undo()
    before._last.clear()
    alone = run(configs[0].model_copy(update={"name": "alone"}))
    assert {json.dumps(one.result["test_before"]) for one in runs} == {json.dumps(alone.result["test_before"])}
    assert alone.folder.generations_file.read_bytes() == runs[0].folder.generations_file.read_bytes()


def test_the_interface_reads_them_as_a_table(causal_config: Any) -> None:
    finished = run(causal_config(rounds=1, task=GENERATES))
    table = fedelta.open_run(Path(finished.folder.path)).generations
    assert list(table.columns) == ["round", "split", "row", "prompt", "answer", "references", "exact"]


@pytest.mark.slow
def test_a_run_over_flower_keeps_the_same_answers(causal_config: Any) -> None:
    from fedelta.federation.engines import Observer
    from fedelta.flower.loopback import run_on_loopback

    alone = run(causal_config(name="alone", task=EXACT, **BEFORE))
    apart = run_on_loopback(causal_config(name="apart", task=EXACT, **BEFORE), False, Observer())
    assert apart.folder.generations_file.read_bytes() == alone.folder.generations_file.read_bytes()
    assert apart.result == alone.result
