"""The check of a configuration before torch is imported: the same line as later, and no heavy import."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from fedelta.errors import FedeltaError
from fedelta.reading import parse_yaml
from fedelta.runs.config import load_config, parse_config
from fedelta.runs.config_file import read_configuration
from fedelta.runs.config_keys import config_keys, configuration_page
from fedelta.runs.config_schema import schema_text
from fedelta.runs.early_check import check_early
from fedelta.sweep.cell_settings import check_cells_early
from fedelta.sweep.grid import load_grid
from paths import ROOT

EARLY = [
    ("rouns=3", "unknown key 'rouns'; did you mean 'rounds'"),
    ("bogus=3", "unknown key 'bogus'$"),
    ("learning_rate=3", "unknown key 'learning_rate'; did you mean 'training.learning_rate'"),
    ("training.epocs=3", "unknown key 'training.epocs'; did you mean 'epochs'"),
    ("evaluation.harness.taks=3", "unknown key 'evaluation.harness.taks'; did you mean 'tasks'"),
    ("task={kind: completion, promt: x}", "unknown key 'task.promt'; did you mean 'prompt'"),
    ("task.prompt=x", "unknown key 'task.prompt'"),
    (
        "task=summary",
        "'kind' should be one of 'classification', 'regression', 'completion', 'conversation', found 'summary'",
    ),
    ("task={kind: completion, prompt: 3}", "task.prompt: input should be a valid string, found 3"),
    ("task=3", "task: input should be keys and values, found 3"),
    ("rounds=x", "rounds: input should be a whole number, found 'x'"),
    ("rounds=1.5", "rounds: input should be a whole number, found 1.5"),
    ("rounds=true", "rounds: expected a number, found True"),
    ("federation.weighting=[1, true]", "federation.weighting: expected a number"),
    ("federation.weighting=[1, x]", "federation.weighting.1: input should be a number, found 'x'"),
    ("federation.weighting=even", "input should be 'examples' or 'uniform' or a list, found 'even'"),
    ("workers=many", "workers: input should be a whole number or 'auto', found 'many'"),
    ("training=3", "training: input should be keys and values, found 3"),
    ("training.learning_rate=.inf", "training.learning_rate: input should be a finite number, found inf"),
    ("training.learning_rate=-1", "training.learning_rate: input should be greater than 0, found -1"),
    ("data.splits={exam: x}", "data.splits.exam: input should be 'train', 'validation' or 'test', found 'exam'"),
    ("data.text=[a, b, c]", "data.text"),
    ("partition.clients=1000000000", "partition.clients: input should be less than or equal to 1000000"),
    ("ranks.high=1000000000", "ranks.high: input should be less than or equal to 10000"),
    ("ranks.per_client=[4, 1000000000]", "ranks.per_client.1: input should be less than or equal to 10000"),
    ("rounds=1000000000000000000", "rounds: input should be less than or equal to 1000000000"),
    ("workers=1000000", "workers: input should be less than or equal to 1024"),
    ("compare.seeds=1000000000", "compare.seeds: input should be less than or equal to 10000"),
    ("data.split_seed=99999999999999999999", "data.split_seed: expected at most 2⁶³ − 1"),
    ('output="a\\0b"', "output: expected text without a null character"),
    ("name=../../x", "name: string should match pattern"),
    ("name=/x", "name: string should match pattern"),
    ("name=''", "name: string should match pattern"),
    (f"name={'x' * 300}", "name: string should have at most 100 characters"),
    ("method=fedx", "unknown method 'fedx'; did you mean 'fedex'"),
    ("method=FedEx", "unknown method 'FedEx'; did you mean 'fedex'"),
    ("method=[fedex]", "method: input should be keys and values"),
    ("method={name: fedex, residul: exact}", "method fedex has no option 'residul'; did you mean 'residual'"),
    ("method={name: hetlora, gamma: 2}", "method hetlora: gamma: input should be less than or equal to 1, found 2"),
    ("method={name: fedex, refresh: true}", "method fedex: refresh: expected a number, found True"),
    ("method.server_learning_rate=.inf", "server_learning_rate: input should be a finite number, found inf"),
]


@pytest.mark.parametrize(("override", "reason"), EARLY)
def test_a_mistake_has_the_same_line_before_and_after_torch_is_imported(override: str, reason: str) -> None:
    data, name = read_configuration(None, [override])
    with pytest.raises(FedeltaError, match=reason) as early:
        check_early(data, name)
    with pytest.raises(FedeltaError) as late:
        parse_config(data, name)
    assert str(early.value) == str(late.value)
    assert len(str(early.value)) < 300


@pytest.mark.parametrize(
    "override",
    [
        *("rounds='5'", "training.learning_rate=1e-3", "task=completion", "task.metric=macro_f1", "workers=auto"),
        *("federation.weighting=[1, 2]", "data.text=[a, b]", "data.splits={test: x, validation: null}"),
        *("method.refresh=2", "evaluation.harness={tasks: [gsm8k]}", "lora.target_modules=all-linear", "output=a=b=c"),
        *("lora.target_modules=[q, v]", "training.stack=auto", "federation.sample=null", "ranks.per_client=[1, 2]"),
    ],
)
def test_the_early_check_accepts_what_a_run_accepts(override: str) -> None:
    data, name = read_configuration(None, [override])
    check_early(data, name)


def test_the_early_check_accepts_the_grids_of_the_experiments() -> None:
    for file in sorted(ROOT.glob("experiments/*/*.yaml")):
        check_cells_early(load_grid(file))


GRID = """
name: g
config: {rounds: 2}
axes: {method: {a: {method: fedex}, b: {METHOD}}}
tuning: {axes: [method], search: {SEARCH}}
experiments: {e: {axes: {method: all}, rows: method}}
"""
COMMANDS = [
    (["run", "x.yaml"], "rouns: 3", "x.yaml: unknown key 'rouns'"),
    (["run", "x.yaml"], "rounds: true", "rounds: expected a number"),
    (["run", "x.yaml"], "method: fedx", "unknown method 'fedx'"),
    (["run", "x.yaml"], "method: {name: fedex, residul: exact}", "no option 'residul'"),
    (["run", "training.epocs=2"], "", "unknown key 'training.epocs'"),
    (["run", "x.yaml"], "rounds: 3\nseed: 1\nrounds: 5", "key 'rounds' is set twice, in lines 1 and 3"),
    (["run", "y.yaml"], "", "configuration y.yaml: No such file or directory; did you mean 'x.yaml'"),
    (["compare", "x.yaml"], "rouns: 3", "unknown key 'rouns'"),
    (["compare", "x.yaml", "--methods", "fedex,fedx"], "", "unknown method 'fedx'"),
    (["compare", "x.yaml"], "compare: {methods: [fedx]}", "unknown method 'fedx'"),
    (["serve", "x.yaml", "--insecure"], "rouns: 3", "unknown key 'rouns'"),
    (["join", "x.yaml", "--insecure", "--data", "d"], "rouns: 3", "unknown key 'rouns'"),
    (["sweep", "x.yaml"], "nam: g", "grid x.yaml: unknown key 'nam'; did you mean 'name'"),
    (["sweep", "x.yaml"], GRID.replace("METHOD", "rouns: 3").replace("SEARCH", "rounds: [1]"), "unknown key 'rouns'"),
    (["sweep", "x.yaml"], GRID.replace("METHOD", "").replace("SEARCH", "rounds: [1, x]"), "rounds: input should be"),
    (["config", "trainig"], "", "no key or section 'trainig'; did you mean 'training'"),
    (["rnu"], "", "No such command 'rnu'"),
]


@pytest.mark.parametrize(("arguments", "content", "reason"), COMMANDS)
def test_a_mistake_is_told_without_importing_torch(
    arguments: list[str], content: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "x.yaml").write_text(content)
    code = (
        f"import sys; sys.argv = ['fedelta', *{arguments}]\nfrom fedelta.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pandas', 'peft'} & set(sys.modules)\n"
        "    print('imported:', *heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "imported:\n")
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


NEWEST = tuple(map(int, version("pydantic").split(".")[:2])) >= (2, 12)


@pytest.mark.skipif(not NEWEST, reason="older versions of pydantic write the schema differently")
def test_the_committed_schema_and_page_are_those_of_the_code() -> None:
    how = "run: python -m fedelta.runs.config_schema && python -m fedelta.runs.config_keys docs/configuration.md"
    assert (ROOT / "src/fedelta/runs/config.schema.json").read_text() == schema_text(), how
    assert (ROOT / "docs/configuration.md").read_text() == configuration_page(), how


def test_every_key_of_the_list_has_a_type_and_a_meaning() -> None:
    keys = config_keys()
    assert {"training.learning_rate", "partition.kind", "task.generate.beams", "method"} <= {key.path for key in keys}
    for key in keys:
        assert key.type, key.path
        assert key.meaning or key.path == "task.kind", key.path
    assert {key.path for key in config_keys("fedex")} >= {"method.residual", "method.refresh"}


BROKEN = [
    ("a: 1\na: 2", "key 'a' is set twice, in lines 1 and 2"),
    ("{a: 1, a: 2}", "key 'a' is set twice, in lines 1 and 1"),
    ("x:\n  a: 1\n  b: 2\n  a: 3", "key 'a' is set twice, in lines 2 and 4"),
    ("a: 1\n---\nb: 2", "expected a single document"),
    ("a:\n\tb: 1", "line 2, column 1"),
    ("a: [1", "not valid YAML: .* at line 1"),
    ("a: !!python/object:os.system 1", "could not determine a constructor"),
    ("a: &x [*x]", "a value that contains itself"),
    ("[" * 5000, "nested too deeply"),
    ("a: &a [x,x,x,x,x,x,x,x]\n" + "".join(f"b{i}: &b{i} [{','.join([f'*b{i - 1}'] * 9) if i else '*a'}]\n"
     for i in range(12)), "more than 1,000,000 values"),
    ("a: " + "9" * 5000, "4300 digits"),
    ("a: \x00", "unacceptable character"),
    ("? [1, 2]\n: 3\n? {a: 1}\n: 3", "not valid YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), BROKEN)
def test_broken_yaml_is_one_short_line(text: str, reason: str) -> None:
    with pytest.raises(FedeltaError, match=reason) as raised:
        parse_yaml(text, "x.yaml")
    assert len(str(raised.value)) < 300
    assert "\n" not in str(raised.value)


def test_yaml_numbers_are_decimal_and_anchors_may_be_changed() -> None:
    assert parse_yaml("[010, 1:30, 10, -3, 1_000, 1.5]", "x") == ["010", "1:30", 10, -3, 1000, 1.5]
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", "x") == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", None),
        (b"# nothing\n", None),
        (b"\xef\xbb\xbfrounds: 3", None),
        ("name: r\n# größer".encode(), None),
        (b"- a", "holds a list, expected keys and values"),
        (b"hello", "holds a str, expected keys and values"),
        (b"1: 2", "key 1 is a int, expected a name"),
        (b"\xff\xfe", "not a text file"),
        (b"a: " + b"x" * 10_000_001, "more than 10,000,000 bytes"),
    ],
)
def test_a_file_is_keys_and_values_in_utf8(content: bytes, reason: str | None, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    if reason is None:
        check_early(*read_configuration(tmp_path / "x.yaml"))
    else:
        with pytest.raises(FedeltaError, match=reason):
            read_configuration(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["rounds.x=1"], "rounds.x: rounds is 6, expected a section with keys"),
        (["training.steps.x=1"], "training.steps.x: training.steps is 6, expected a section with keys"),
        (["training..steps=1"], "expected key=value"),
        (["=1"], "expected key=value"),
        ([".=1"], "expected key=value"),
        (["rounds={a: 1, a: 2}"], "override 'rounds={a: 1, a: 2}': key 'a' is set twice"),
    ],
)
def test_a_setting_with_an_impossible_key_is_one_line(overrides: list[str], reason: str) -> None:
    with pytest.raises(FedeltaError, match=reason):
        read_configuration(None, overrides)


def test_a_setting_keeps_the_kind_of_a_task_and_the_name_of_a_method() -> None:
    small = ["task.generate={max_new_tokens: 4}", "task.answer=text", "task.metric=exact", "partition.kind=iid"]
    assert load_config(None, ["task=completion", *small]).task.kind == "completion"
    assert load_config(None, ["method=fedex", "method.residual=rank=2"]).method.options == {"residual": "rank=2"}
    assert load_config(None, ["method.refresh=2"]).method.name == "replication"


@pytest.mark.parametrize(
    "data",
    [
        {"data": {"unlabeled": [-1]}},
        {"data": {"unlabeled": [-1.0, "-"]}},
        {"task": {"kind": "completion", "date": "2024-01-01"}},
        {"data": {"source": ["a.csv", "b.csv"]}},
        {"data": {"text": ["a", "b"]}},
    ],
)
def test_what_a_configuration_accepts_passes_the_early_check(data: dict[str, Any]) -> None:
    check_early(data)
    parse_config(data)
