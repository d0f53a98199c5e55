"""The grid file: the runs that it describes, what tuning chooses, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedelta.errors import FedeltaError
from fedelta.learning.tasks.metrics import METRICS
from fedelta.runs.config import Config, parse_config
from fedelta.sweep.cells import Expansion, Plan, Trial, cell_key, choose
from fedelta.sweep.grid import Grid, load_grid
from fedelta.sweep.results import is_result_of, result_settings
from paths import ROOT

GRID: dict[str, Any] = {
    "name": "grid",
    "seeds": [0, 1],
    "config": {"rounds": 3, "training.learning_rate": 0.5, "method": "fedit"},
    "axes": {
        "method": {"mean": {}, "exact": {"method": {"name": "fedex", "residual": "rank=2"}}},
        "rank": {"low": {"ranks.high": 2}, "high": {"ranks": {"high": 4}}},
        "refresh": {"never": {}, "often": {"method.refresh": 1}},
    },
    "experiments": {
        "all": {"axes": {"method": "all", "rank": "all"}, "rows": "method"},
        "again": {"axes": {"method": "exact", "rank": ["low"], "refresh": "all"}, "rows": "refresh"},
    },
    "sizes": {"small": {}, "large": {"config": {"rounds": 9}, "axes": {"rank": {"high": {"ranks": {"high": 32}}}}}},
}


def load(tmp_path: Path, size: str | None = None, **changes: Any) -> Grid:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(GRID | changes, sort_keys=False))
    return load_grid(path, size)


def test_axes_are_crossed_and_a_cell_of_two_experiments_runs_once(tmp_path: Path) -> None:
    plan = Expansion(load(tmp_path)).cells(None)
    assert [p.experiment for p in plan.places].count("all") == 2 * 2 * 2
    assert [p.experiment for p in plan.places].count("again") == 2 * 2
    # "exact, low" without a refresh belongs to both experiments.
    assert len(plan.cells) == 8 + 4 - 2
    for place in plan.places:
        config = plan.cells[place.key]
        assert config.seed == place.seed
        assert config.method.name == {"mean": "fedit", "exact": "fedex"}[place.values["method"]]
        assert config.ranks.high == {"low": 2, "high": 4}[place.values["rank"]]
        refresh = {"refresh": 1} if place.values.get("refresh") == "often" else {}
        exact = {"residual": "rank=2"} if place.values["method"] == "exact" else {}
        assert config.method.options == exact | refresh, "setting a key keeps the other keys"
        assert (config.rounds, config.training.learning_rate) == (3, 0.5)


def test_a_size_is_merged_over_the_rest(tmp_path: Path) -> None:
    small, large = load(tmp_path), load(tmp_path, "large")
    assert (small.size, large.size) == ("small", "large")
    assert small.folder == Path("runs/grid/small")
    configs = Expansion(large).cells(None).cells.values()
    assert {config.rounds for config in configs} == {9}
    assert {config.ranks.high for config in configs} == {2, 32}
    assert load(tmp_path, sizes={}).folder == Path("runs/grid")
    with pytest.raises(FedeltaError, match="has no size 'huge', found small, large"):
        load(tmp_path, "huge")


def test_the_grid_stored_with_its_results_is_the_same_grid(tmp_path: Path) -> None:
    grid = load(tmp_path, "large").model_copy(update={"overrides": {"rounds": 2}})
    (tmp_path / "left.yaml").write_text(yaml.safe_dump(grid.dump(), sort_keys=False))
    again = load_grid(tmp_path / "left.yaml")
    assert Expansion(again).cells(None) == Expansion(grid).cells(None)
    assert {config.rounds for config in Expansion(again).cells(None).cells.values()} == {2}


def test_experiments_and_values_can_be_selected(tmp_path: Path) -> None:
    grid = load(tmp_path)
    plan = Expansion(grid, ["all"], {"rank": ["low"], "method": ["mean", "exact"]}).cells(None)
    assert {(p.experiment, p.values["rank"]) for p in plan.places} == {("all", "low")}
    assert len(plan.cells) == 4
    # A condition on an axis does not affect experiments without that axis.
    assert len(Expansion(grid, (), {"refresh": ["often"]}).cells(None).places) == 8 + 2
    with pytest.raises(FedeltaError, match="no experiment 'some' in the grid, found all, again"):
        Expansion(grid, ["some"])
    with pytest.raises(FedeltaError, match="axis 'rank' has no value 'middle'"):
        Expansion(grid, (), {"rank": ["middle"]})


TUNING = {
    "axes": ["method"],
    "at": {"rank": "low"},
    "search": {"training.learning_rate": [0.1, 0.2], "lora.alpha": [8, 16]},
    "seeds": [7, 8],
    "config": {"rounds": 1},
}


def test_every_value_is_tuned_with_the_same_candidates_and_keeps_its_own_choice(tmp_path: Path) -> None:
    expansion = Expansion(load(tmp_path, tuning=TUNING))
    plan, trials = expansion.trials()
    assert len(trials) == 2 * 4
    assert len(plan.cells) == 2 * 4 * 2
    for method in ("mean", "exact"):
        choices = [trial.choice for trial in trials if trial.values == (method,)]
        assert choices == [
            {"training.learning_rate": rate, "lora.alpha": alpha} for rate in (0.1, 0.2) for alpha in (8, 16)
        ]
    assert {(c.rounds, c.ranks.high, c.seed) for c in plan.cells.values()} == {(1, 2, 7), (1, 2, 8)}
    chosen = {("mean",): {"training.learning_rate": 0.2}, ("exact",): {"lora.alpha": 8}}
    cells = expansion.cells(chosen)
    assert not expansion.cells({}).places, "a value without a choice is left out and never runs untuned"
    assert {p.values["method"] for p in expansion.cells({("mean",): {}}).places} == {"mean"}
    for place in cells.places:
        config = cells.cells[place.key]
        expected = (0.2, 16.0) if place.values["method"] == "mean" else (0.5, 8.0)
        assert (config.training.learning_rate, config.lora.alpha) == expected
        assert config.rounds == 3
    only = Expansion(load(tmp_path, tuning=TUNING), (), {"method": ["mean"]})
    assert {trial.values for trial in only.trials()[1]} == {("mean",)}, "values that do not run are not tuned"


def test_an_untuned_experiment_may_have_a_tuned_key_as_an_axis(tmp_path: Path) -> None:
    rates = {"axes": {"rank": "all", "rate": "all"}, "rows": "rate", "tuned": False}
    axes = GRID["axes"] | {"rate": {str(r): {"training.learning_rate": r} for r in (0.1, 0.2)}}
    grid = load(tmp_path, tuning=TUNING, axes=axes, experiments=GRID["experiments"] | {"rates": rates})
    alone = Expansion(grid, ["rates"])
    assert alone.trials() == (Plan(), []), "no trial is needed for it"
    plan = Expansion(grid).cells({("mean",): {"training.learning_rate": 0.3}})
    places = [place for place in plan.places if place.experiment == "rates"]
    assert len(places) == 2 * 2 * 2
    assert {plan.cells[place.key].training.learning_rate for place in places} == {0.1, 0.2}
    others = {plan.cells[p.key].training.learning_rate for p in plan.places if p.experiment == "all"}
    assert others == {0.3}


def test_combinations_of_axes_are_tuned_separately(tmp_path: Path) -> None:
    grid = load(tmp_path, tuning=TUNING | {"axes": ["method", "rank"], "at": {}})
    expansion = Expansion(grid, (), {"rank": ["low"]})
    assert {trial.values for trial in expansion.trials()[1]} == {("mean", "low"), ("exact", "low")}
    plan = Expansion(grid, ["all"]).cells({("mean", "high"): {"lora.alpha": 8}, ("exact", "low"): {"lora.alpha": 16}})
    alphas = {(p.values["method"], p.values["rank"], plan.cells[p.key].lora.alpha) for p in plan.places}
    assert alphas == {("mean", "high", 8.0), ("exact", "low", 16.0)}


def row(accuracies: list[float], failed: str | None = None, loss: float = 1.0) -> dict[str, Any]:
    rounds = [{"round": i + 1, "validation": {"accuracy": a, "loss": loss}} for i, a in enumerate(accuracies)]
    return {"rounds": rounds, "failed": failed, "metric": "accuracy"}


def test_the_choice_is_the_best_mean_over_late_evaluations_and_seeds() -> None:
    trials = [Trial(("m",), {"rate": rate}, (f"{rate}-7", f"{rate}-8")) for rate in (1, 2, 3, 4)]
    rows = {
        # A single lucky evaluation or seed does not win.
        "1-7": row([0.9, 0.9, 0.5, 0.5]),
        "1-8": row([0.9, 0.9, 0.5, 0.5]),
        "2-7": row([0.1, 0.1, 0.6, 0.6]),
        "2-8": row([0.1, 0.1, 0.6, 0.6]),
        "3-7": row([0.9, 0.9, 0.9, 0.9]),
        "3-8": row([0.1, 0.1, 0.1, 0.1]),
        # A candidate that diverges under one seed does not win either.
        "4-7": row([0.99, 0.99, 0.99, 0.99]),
        "4-8": row([], "not finite"),
    }
    assert choose(trials, rows, 0.5) == {("m",): {"rate": 2}}
    assert choose(trials, rows, 1.0) == {("m",): {"rate": 1}}
    del rows["4-8"]
    assert choose(trials, rows, 0.5) == {}, "there is no choice while a trial is missing"
    others = [Trial(("n",), {"rate": 5}, ("1-7",))]
    assert choose([*trials, *others], rows, 0.5) == {("n",): {"rate": 5}}, "except for a value with all of its trials"
    same = {key: row([0.5]) for trial in trials for key in trial.keys}
    assert choose(trials, same, 0.5) == {("m",): {"rate": 1}}, "of equal candidates, the first"
    rows = same | {"3-7": row([0.5], loss=0.8)}
    assert choose(trials, rows, 0.5) == {("m",): {"rate": 3}}, "or the one with the lowest loss"
    none = {key: row([], "not finite") for trial in trials for key in trial.keys}
    assert choose(trials, none, 0.5) == {}, "a candidate that always diverges is not chosen"


def test_the_key_of_a_cell_depends_on_what_its_result_depends_on() -> None:
    config = parse_config({"rounds": 3, "method": {"name": "fedex", "residual": "rank=2"}})
    same = {"name": "x", "output": "y", "workers": 2, "compare": {"seeds": 3}, "evaluation": {"target": 0.5}}
    key = cell_key(config)
    assert key == cell_key(parse_config({**config.dump(), **same}))
    whole = parse_config({**config.dump(), "method": {"name": "hetlora", "gamma": 1}})
    assert cell_key(whole) == cell_key(parse_config({**config.dump(), "method": {"name": "hetlora", "gamma": 1.0}}))
    others = [{"rounds": 4}, {"seed": 1}, {"method": "fedex"}, {"lora": {"alpha": 3}}, {"training": {"stack": 2}}]
    assert len({key, *(cell_key(parse_config({**config.dump(), **other})) for other in others)}) == len(others) + 1
    assert cell_key(Config()) != cell_key(parse_config({"method": "fedex"}))


def test_results_outlive_a_new_setting_but_not_a_changed_one() -> None:
    config = parse_config({"rounds": 3})
    stored = result_settings(config)
    assert is_result_of({"cell": "x", "config": json.dumps(stored)}, config)
    older = json.loads(json.dumps(stored))
    del older["ranks"]["loss_on"]
    assert is_result_of({"cell": "x", "config": json.dumps(older)}, config)
    older["lora"]["alpha"] = 99
    assert not is_result_of({"cell": "x", "config": json.dumps(older)}, config)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"axis": {}}, "unknown key 'axis'; did you mean 'axes'"),
        ({"experiments": {}}, "experiments: dictionary should have at least 1 item"),
        (
            {"experiments": {"e": {"axes": {"methods": "all"}, "rows": "methods"}}},
            r"experiments.e.axes: no axis 'methods'; did you mean 'method'",
        ),
        (
            {"experiments": {"e": {"axes": {"method": ["men"]}, "rows": "method"}}},
            "axis method has no value 'men'; did you mean 'mean'",
        ),
        (
            {"experiments": {"e": {"axes": {"method": "all"}, "rows": "rank"}}},
            "experiments.e.rows is 'rank', expected one of its axes",
        ),
        (
            {"experiments": {"e": {"axes": {"method": "all"}, "rows": "method", "baseline": "x"}}},
            "experiments.e.baseline is 'x', expected one of its rows",
        ),
        (
            {"experiments": {"e": {"axes": {"method": "all"}, "rows": "method", "show": ["everything"]}}},
            "experiments.e.show.0: input should be 'score'",
        ),
        ({"tuning": TUNING | {"at": {"rank": "middle"}}}, "tuning.at: axis rank has no value 'middle'"),
        ({"tuning": TUNING | {"axes": ["refresh"]}}, "experiments.all lacks the axis 'refresh', which is tuned"),
        ({"tuning": TUNING | {"seeds": [1, 7]}}, "tuning.seeds: 1 is also a seed of the experiments"),
        ({"tuning": TUNING | {"seeds": []}}, "tuning.seeds: tuple should have at least 1 item"),
        (
            {"tuning": TUNING | {"search": {"lora.alpha": []}}},
            "tuning.search.lora.alpha: tuple should have at least 1 item",
        ),
        ({"axes": {"method": None}}, "axes.method: input should be keys and values"),
        ({"axes": ["method"]}, "axes: input should be keys and values"),
        ({"experiments": {"e": None}}, "experiments.e: input should be keys and values"),
        ({"experiments": {"../e": {"axes": {"method": "all"}, "rows": "method"}}}, "should match pattern"),
        (
            {"experiments": {"e": {"axes": {"method": ["mean", "mean"]}, "rows": "method"}}},
            r"method has the values \['mean', 'mean'\], expected at least one, each once",
        ),
        ({"seeds": [1, 1]}, "seeds: .*expected each once"),
        ({"config": {"seed": 3}}, "seed: the grid sets it for each cell"),
        ({"sizes": ["small"]}, "sizes holds .*expected a name and keys for each"),
        ({"sizes": {"small": [1]}}, "sizes holds .*expected a name and keys for each"),
    ],
)
def test_an_invalid_grid_is_refused_with_one_line(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(FedeltaError, match=complaint) as refusal:
        load(tmp_path, **changes)
    assert "\n" not in str(refusal.value)


def test_every_cell_is_checked_before_the_first_one_runs(tmp_path: Path) -> None:
    axes = GRID["axes"] | {"rank": {"low": {}, "high": {"rank.high": 3}}}
    with pytest.raises(FedeltaError, match="grid grid, method mean, rank high: unknown key 'rank'"):
        Expansion(load(tmp_path, axes=axes)).check()
    axes = GRID["axes"] | {"rank": {"low": {}, "high": {"ranks": {"allocation": "fixed", "low": 1}}}}
    with pytest.raises(FedeltaError, match="all: mean, high, seed 0: method fedit needs equal ranks"):
        Expansion(load(tmp_path, axes=axes)).check()


def test_an_empty_value_has_no_keys(tmp_path: Path) -> None:
    axes = GRID["axes"] | {"refresh": {"never": None, "often": {"method.refresh": 1}}}
    assert Expansion(load(tmp_path, axes=axes)).cells(None) == Expansion(load(tmp_path)).cells(None)


def test_two_names_for_one_configuration_are_refused(tmp_path: Path) -> None:
    grid = load(tmp_path).model_copy(update={"overrides": {"method": "fedex"}})
    with pytest.raises(FedeltaError, match="all: mean, low, seed 0 and all: exact, low, seed 0 are the same"):
        Expansion(grid).check()
    with pytest.raises(FedeltaError, match="these experiments have no cell with these values"):
        Expansion(load(tmp_path), ["again"], {"method": ["mean"]}).check()
    with pytest.raises(FedeltaError, match="training.stack: auto, expected a number"):
        Expansion(load(tmp_path, config={"training": {"stack": "auto"}})).check()
    shown = {"e": {"axes": {"method": "all"}, "rows": "method", "show": ["first-aggregation"]}}
    with pytest.raises(FedeltaError, match="first-aggregation needs evaluation.clients: 1 or more"):
        Expansion(load(tmp_path, experiments=shown)).check()


def test_files_that_are_not_grids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FedeltaError, match="No such file"):
        load_grid(tmp_path / "nothing.yaml")
    for text, complaint in (
        ("- a", "holds a list"),
        ("a: [", "grid .*line 1, column 5"),
        ("name: x", "axes: field required"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(FedeltaError, match=complaint):
            load_grid(tmp_path / "bad.yaml")


@pytest.mark.parametrize("document", ["docs/grids.md"])
def test_grids_in_the_documents_are_valid(document: str, tmp_path: Path) -> None:
    text = (ROOT / document).read_text()
    begin = text.index("```yaml\nname: ranks") + len("```yaml\n")
    (tmp_path / "grid.yaml").write_text(text[begin : text.index("```", begin)])
    expansion = Expansion(load_grid(tmp_path / "grid.yaml"))
    expansion.check()
    assert len(expansion.cells(None).cells) == 2 * 2 * 3


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 0.8), ("matthews", -0.1), ("loss", 2.0)])
def test_a_target_is_slightly_worse_than_the_best_score(metric: str, best: float) -> None:
    judged = METRICS[metric]
    target = judged.share(best, 0.95)
    assert judged.reaches(best, target)
    assert not judged.reaches(target - 0.01 * abs(best) * (-1 if judged.lower else 1), target)
