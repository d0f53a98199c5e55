"""Tables and figures of a grid: they agree with the rows, and they report missing runs."""

import io
import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any, get_args

import pytest
from rich.console import Console

from fedelta.runs.report.statistics import paired, spread
from fedelta.runs.report.text_table import TextTable
from fedelta.sweep.cells import Expansion
from fedelta.sweep.grid import Grid, View
from fedelta.sweep.report import deviations as grid_deviations
from fedelta.sweep.report import figures as grid_figures
from fedelta.sweep.report.differences import by_axis, by_round
from fedelta.sweep.report.figures import in_depth, short_names
from fedelta.sweep.report.report import write_grid_report
from fedelta.sweep.report.results import gather
from fedelta.sweep.report.scores import all_scores, final, late, rounds_to_target
from fedelta.sweep.report.traffic_and_ranks import energy, first_aggregation, high_rank_clients, traffic
from fedelta.sweep.results import Row, result_settings

SHOW = get_args(View)
GRID = Grid.model_validate(
    {
        "name": "grid",
        "seeds": [0, 1, 2],
        "config": {
            "rounds": 4,
            "ranks": {"allocation": "fixed", "low": 1, "high": 2, "share": 0.5},
            "evaluation": {"clients": 1},
        },
        "axes": {
            "method": {"zero padding": {"method": "zero-padding"}, "replication": {"method": "replication"}},
            "data": {"first_set": {"lora.alpha": 1}, "second_set": {"lora.alpha": 2}},
        },
        "labels": {"first_set": "AG & News_4 %"},
        "experiments": {
            "main": {"axes": {"method": "all", "data": "all"}, "rows": "method", "show": SHOW, "title": "Main"}
        },
    }
)
ACCURACY = {
    ("zero padding", "first_set"): (0.50, 0.52, 0.54),
    ("replication", "first_set"): (0.60, 0.61, 0.66),
    ("zero padding", "second_set"): (0.70, 0.70, 0.70),
    ("replication", "second_set"): (0.69, 0.72, 0.71),
}
FIGURES = (
    "curves",
    "deviation",
    "deviation-by-round",
    "deviation-by-round-scaled",
    "deviation-scaled",
    "difference-by-round",
    "energy",
)
BYTES = {"adapter": 4_000_000, "heads": 1_000_000, "patch": 0, "overhead": 500_000}


def synthetic_rows() -> dict[str, Row]:
    """Rows of four rounds each, in which validation accuracy rises by 0.1 per round to the test accuracy."""
    plan, rows = Expansion(GRID).cells(None), {}
    for place in plan.places:
        final = ACCURACY[place.values["method"], place.values["data"]][place.seed]
        config = plan.cells[place.key]
        rounds = [
            {
                "round": r + 1,
                "clients": 2,
                "sampled": 4,
                "validation": {"accuracy": final - 0.1 * (3 - r), "loss": 1.0, "macro_f1": 0.5} if r != 1 else None,
                "down": BYTES,
                "up": {**BYTES, "adapter": 2_000_000},
                "ranks": {"1": 3, "2": 1},
                "promoted": ["client-009"] if r == 1 else [],
                "deviation": {"layer.0.query": 0.1 * r, "layer.1.query": 0.2 * r},
                "energy": [3.0, 1.0] if r else [0.0, 0.0],
                "own": [
                    {"client": "a", "rank": 2, "score": 0.9},
                    {"client": "b", "rank": 1, "score": 0.1},
                ]
                if r == 0
                else [],
            }
            for r in range(4)
        ]
        rows[place.key] = {
            "cell": place.key,
            "method": config.method.name,
            "seed": place.seed,
            "failed": None,
            "inputs": None,
            "clients": 10,
            "metric": "accuracy",
            "test": {"accuracy": final},
            "validation": {"accuracy": final},
            "lora_parameters": {"1": 10, "2": 20},
            "base_parameters": 1_000_000,
            "rounds": rounds,
            "scaled_deviation": [{"layer.0.query": 1e-3 * r, "layer.1.query": 3e-3 * r} for r in range(4)],
            "config": json.dumps(result_settings(config)),
            "seconds": 3600.0,
            "peak_mb": 100.0,
            "finished": "2026-01-02T03:04:05+00:00",
            "machine": "a machine",
            "versions": {"torch": "2", "commit": "abc"},
        }
    return rows


def rows_of(table: TextTable) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in table.rows}


def test_the_paired_test_is_students_t_test() -> None:
    ours, theirs = [0.60, 0.61, 0.66, 0.58], [0.50, 0.52, 0.54, 0.55]
    difference = paired(ours, theirs)
    assert difference is not None
    d = [a - b for a, b in zip(ours, theirs, strict=True)]
    t = mean(d) / (stdev(d) / math.sqrt(4))
    # Student's t distribution with three degrees of freedom has a closed form.
    x = t / math.sqrt(3)
    p = 1 - 2 / math.pi * (math.atan(x) + x / (1 + x * x))
    assert difference.p == pytest.approx(p, rel=1e-9)
    assert difference.mean == pytest.approx(mean(d))
    # Its 97.5 % quantile is 3.18245.
    assert difference.high - difference.mean == pytest.approx(3.18245 * stdev(d) / 2, rel=1e-5)
    assert difference.low + difference.high == pytest.approx(2 * difference.mean)
    assert difference.pairs == 4


def test_no_paired_test_without_two_pairs_or_without_spread() -> None:
    assert paired([0.5], [0.4]) is None
    assert paired([0.5, 0.6], [0.5, 0.6]) is None
    assert paired([0.3, 0.5, 0.9], [0.1, 0.3, 0.7]) is None, "equal up to rounding"
    assert (spread([]), spread([0.5], 100), spread([0.5, 0.6], 100)) == ("–", "50.00", "55.00 ± 7.07")


def test_differences_by_axis_are_paired_over_seeds_within_the_columns_of_a_value() -> None:
    rows = synthetic_rows()
    for row in rows.values():
        if row["method"] == "replication":
            row["rounds"][0]["validation"]["accuracy"] += 0.05
            row["test"]["accuracy"] += 0.1
    (results,) = gather(GRID, rows)
    table = by_axis(results)
    assert table.head == [
        "columns",
        "zero padding: deviation, %",
        "replication, after round 1",
        "replication, late",
        "replication, test",
    ]
    first, second, both = table.rows
    assert [row[0] for row in table.rows] == ["data: AG & News_4 %", "data: second_set", "all columns"]

    def expected(columns: list[str], more: float) -> str:
        ours, theirs = (
            [mean(ACCURACY[method, c][seed] for c in columns) for seed in range(3)]
            for method in ("replication", "zero padding")
        )
        difference = paired([value + more for value in ours], theirs)
        assert difference is not None
        low, high = 100 * difference.low, 100 * difference.high
        return f"{100 * difference.mean:+.2f} ({low:+.2f} to {high:+.2f}, p {difference.p:.3f})"

    for row, columns in ((first, ["first_set"]), (second, ["second_set"]), (both, ["first_set", "second_set"])):
        assert row[2:] == [expected(columns, more) for more in (0.05, 0, 0.1)]
    # (0 + 0.1 + 0.2 + 0.3)/4 in one layer, twice that in the other.
    assert both[1] == "22.50 ± 0.00"


def test_all_scores_has_columns_for_the_scores_of_each_task() -> None:
    rows = synthetic_rows()
    for row in rows.values():
        if json.loads(row["config"])["lora"]["alpha"] == 1:
            row["test"] = {"pearson": row["test"]["accuracy"], "loss": 1.5}
    (results,) = gather(GRID, rows)
    table = all_scores(results)
    first, second = "AG & News_4 %, ", "second_set, "
    assert table.head == ["method", f"{first}Pearson correlation, %", f"{first}loss", f"{second}accuracy, %"]
    assert rows_of(table)["zero padding"][1:] == ["1.500 ± 0.000", "70.00 ± 0.00"]


def test_scores_are_mean_and_spread_over_seeds_with_tests_against_the_baseline() -> None:
    (results,) = gather(GRID, synthetic_rows())
    table = final(results)
    assert table.head == [
        "method",
        "AG & News_4 %",
        "second_set",
        "all: mean",
        "difference",
        "95 % interval",
        "p",
    ]
    rows = rows_of(table)
    assert rows["zero padding"] == ["52.00 ± 2.00", "70.00 ± 0.00", "61.00 ± 1.00", "", "", ""]
    first, second = (
        paired(ACCURACY["replication", s], ACCURACY["zero padding", s]) for s in ("first_set", "second_set")
    )
    # Columns under one seed are not independent, so their mean counts as one value.
    both = paired(
        *(
            [mean(pair) for pair in zip(ACCURACY[row, "first_set"], ACCURACY[row, "second_set"], strict=True)]
            for row in ("replication", "zero padding")
        )
    )
    assert first
    assert second
    assert both
    assert rows["replication"] == [
        f"62.33 ± 3.21 ({first.p:.3f})",
        f"70.67 ± 1.53 ({second.p:.3f})",
        "66.50 ± 2.00",
        f"{100 * both.mean:+.2f}",
        f"{100 * both.low:+.2f} to {100 * both.high:+.2f}",
        f"{both.p:.3f}",
    ]
    assert "against zero padding" in table.note
    # The last quarter of three evaluations is one evaluation.
    assert rows_of(late(results))["zero padding"][0] == "52.00 ± 2.00"


def test_a_missing_seed_is_left_out_of_pairs_and_reported(tmp_path: Path) -> None:
    rows = synthetic_rows()
    key = next(p.key for p in Expansion(GRID).cells(None).places if p.values["method"] == "replication" and p.seed == 1)
    del rows[key]
    (results,) = gather(GRID, rows)
    assert results.missing == 1
    difference = paired([0.60, 0.66], [0.50, 0.54])
    assert difference is not None
    assert rows_of(final(results))["replication"][0] == f"63.00 ± 4.24 ({difference.p:.3f})"
    _, page = write_grid_report(GRID, rows, tmp_path)
    assert "1 run of this experiment is still missing" in page.read_text()


def test_diverged_runs_are_counted_and_left_out_of_means() -> None:
    rows = synthetic_rows()
    place = next(
        p for p in Expansion(GRID).cells(None).places if p.values == {"method": "replication", "data": "first_set"}
    )
    rows[place.key] |= {"failed": "not finite", "test": None, "validation": None, "rounds": []}
    (results,) = gather(GRID, rows)
    assert rows_of(final(results))["replication"][0].startswith("63.50 ± 3.54, 1 diverged")


def test_rounds_to_target_counts_finished_rounds() -> None:
    (results,) = gather(GRID, synthetic_rows())
    table = rounds_to_target(results)
    # The targets are 95 % of the best scores: 0.627 and 0.684.
    assert table.head[1:] == ["AG & News_4 % to 62.7 %", "second_set to 68.4 %"]
    assert rows_of(table) == {
        "zero padding": ["not reached", "4.0 ± 0.0"],
        "replication": ["4.0, 1 of 3", "4.0 ± 0.0"],
    }


def test_traffic_is_per_client_and_round() -> None:
    (results,) = gather(GRID, synthetic_rows())
    # Three of four clients have 10 parameters and one has 20. Four clients were sent a message, and two replied.
    table = traffic(results)
    # One column for both sets, because only α differs. In fp32, 1 MB down and half of it up are 375,000 numbers.
    assert table.head[1:3] == ["LoRA parameters", "communicated"]
    texts = rows_of(table)
    assert texts["replication"] == ["12", "375,000", "1.000", "0.500", "0.000", "0.500", "2.250"]
    assert texts["full fine-tuning, computed"] == ["1,000,000", "2,000,000", "4.000", "4.000", "–", "–", "8.000"]


def test_columns_of_traffic_are_named_by_the_values_in_which_they_differ() -> None:
    rows = synthetic_rows()
    for row in rows.values():
        config = json.loads(row["config"])
        if config["lora"]["alpha"] == 2:
            row["clients"] = 30  # their patches are wider
            config["federation"]["precision"] = "int8"
        row["config"] = json.dumps(config)
    (results,) = gather(GRID, rows)
    table = traffic(results)
    assert [name for name in table.head if "LoRA" in name] == [
        "AG & News_4 % LoRA parameters",
        "second_set LoRA parameters",
    ]
    assert rows_of(table)["replication"][8] == "–", "with int8, four bytes are not one number"


def test_the_first_round_has_no_patch_to_send() -> None:
    rows = synthetic_rows()
    for row in rows.values():
        for record in row["rounds"][1:]:
            record["down"] = BYTES | {"patch": 700_000 * record["sampled"]}
    (results,) = gather(GRID, rows)
    assert rows_of(traffic(results))["replication"][4] == "0.700"
    assert rows_of(traffic(results))["replication"][1] == "550,000"


def test_settings_that_change_no_bytes_add_no_column() -> None:
    """α is chosen for a data set, and one row is older than a setting."""
    rows = synthetic_rows()
    for row in rows.values():
        config = json.loads(row["config"])
        if row["test"]["accuracy"] >= 0.69:
            config["lora"]["alpha"] = 99
            del config["federation"]["keep"]
        row["config"] = json.dumps(config)
    (results,) = gather(GRID, rows)
    assert len(traffic(results).head) == 8


def test_a_configured_target_is_used() -> None:
    grid = GRID.model_copy(update={"config": {**GRID.config, "evaluation": {"target": 0.55, "clients": 1}}})
    (results,) = gather(grid, synthetic_rows())
    table = rounds_to_target(results)
    assert table.head[1] == "AG & News_4 % to 55.0 %"
    # In the third round the validation accuracies are 0.1 below the last: 0.50, 0.51 and 0.56.
    assert rows_of(table)["replication"][0] == "3.7 ± 0.6"


def test_energy_above_the_lowest_rank_is_a_dash_without_energy_or_with_equal_ranks() -> None:
    rows = synthetic_rows()
    for row in rows.values():
        if row["method"] == "replication":
            row["rounds"][-1]["energy"] = [0.0, 0.0]
    (results,) = gather(GRID, rows)
    cells = rows_of(energy(results))
    assert cells["zero padding"][0] == "25.0 ± 0.0"
    assert cells["replication"][0] == "–", "merged into the base"
    for row in rows.values():
        for record in row["rounds"]:
            record["ranks"] = {"2": 4}
    assert rows_of(energy(gather(GRID, rows)[0]))["zero padding"][0] == "–"


def test_the_first_aggregation_compares_high_rank_clients_with_the_model_that_they_get_back() -> None:
    (results,) = gather(GRID, synthetic_rows())
    cells = rows_of(first_aggregation(results))["zero padding"]
    assert cells[:3] == ["90.00 ± 0.00", "22.00 ± 2.00", "-68.00 ± 2.00"]


def test_high_rank_clients_are_those_from_the_start_and_the_promoted_ones() -> None:
    rows = synthetic_rows()
    (results,) = gather(GRID, rows)
    assert rows_of(high_rank_clients(results))["replication"][:2] == ["–", "–"], (
        "this partition has no balanced clients"
    )
    for row in rows.values():
        config = json.loads(row["config"])
        config["partition"]["kind"] = "two-quality"
        row["config"] = json.dumps(config)
    (results,) = gather(GRID, rows)
    # Five of ten clients from the start and one later; the balanced tenth of the partition is client-000.
    assert rows_of(high_rank_clients(results))["replication"][:2] == ["6.0 ± 0.0", "17 ± 0"]


def test_tables_are_escaped_in_markdown_latex_and_on_the_terminal(tmp_path: Path) -> None:
    table = TextTable("t", "A & B", ["method", "share_%"], [["x_y", "1.50 ± 0.20"], ["a|b [/] c", ""]], "A note.")
    console = Console(file=io.StringIO(), width=100)
    console.print(table.console())
    assert "a|b [/] c" in console.file.getvalue()  # type: ignore[attr-defined]
    markdown, latex = table.write(tmp_path)
    assert "| x_y" in markdown.read_text()
    assert "1.50 ± 0.20 |" in markdown.read_text()
    text = latex.read_text()
    assert r"x\_y" in text
    assert r"share\_\%" in text
    assert text.splitlines()[0] == "% A & B"
    assert r"\toprule" in text
    assert r"a\|b [/] c" in markdown.read_text()


def test_the_page_holds_every_table_and_figure_and_equal_rows_make_equal_files(tmp_path: Path) -> None:
    rows = synthetic_rows()
    tables, page = write_grid_report(GRID, rows, tmp_path / "one")
    text = page.read_text()
    assert "12.00 hours of rounds, summed over runs side by side, 2026-01-02, on a machine." in text
    assert "12 runs; 96 updates of clients were lost or refused." in text
    assert "Versions: torch 2. Commits: abc (12 runs)." in text
    assert all(key in (tmp_path / "one" / "cells.md").read_text() for key in rows)
    for table in tables:
        assert table.markdown().strip() in text
        assert (tmp_path / "one" / "tables" / f"{table.name}.tex").exists()
    figures = sorted(path.name for path in (tmp_path / "one" / "figures").iterdir())
    assert figures == sorted(f"main-{name}.{kind}" for name in FIGURES for kind in ("png", "svg"))
    for name in figures:
        assert name.endswith("png") or f"(figures/{name})" in text
    write_grid_report(GRID, dict(reversed(rows.items())), tmp_path / "two")
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path


def test_the_table_of_deviation_is_of_means_over_modules_and_rounds() -> None:
    rows = synthetic_rows()
    results = gather(GRID, rows)[0]
    texts = rows_of(grid_deviations.deviation(results))["replication"]
    assert texts[:2] == ["22.50 ± 0.00", "3.00e-03 ± 0.0e+00"]
    for row in rows.values():
        row["scaled_deviation"] = [{} for _ in row["rounds"]]  # not measured
    without = grid_deviations.deviation(gather(GRID, rows)[0])
    assert without.head[1:] == ["AG & News_4 % relative, %", "second_set relative, %"]


def test_deviations_by_layer_matrix_and_round_are_means_over_everything_else() -> None:
    rows = synthetic_rows()
    for row in rows.values():
        if row["method"] == "replication":
            for record, scaled in zip(row["rounds"], row["scaled_deviation"], strict=True):
                record["deviation"]["head"] = 0.9
                scaled["head"] = 9e-3
        else:
            for record in row["rounds"]:
                record["deviation"] = dict.fromkeys(record["deviation"], 0.0)
            row["scaled_deviation"] = [dict.fromkeys(by_module, 0.0) for by_module in row["scaled_deviation"]]
    results = gather(GRID, rows)[0]
    layers, matrices, rounds = (
        table(results) for table in (grid_deviations.by_layer, grid_deviations.by_matrix, grid_deviations.by_round)
    )
    for table in (layers, matrices, rounds):
        assert [row[:2] for row in table.rows] == [
            ["replication", "AG & News_4 %"],
            ["replication", "second_set"],
            ["replication", "all"],
        ], "methods without a deviation are left out"
    assert layers.head[2:] == ["layer 0, relative, %", "layer 1, relative, %", "layer 0, scaled", "layer 1, scaled"]
    assert layers.rows[0][2:] == ["15.00 ± 0.00", "30.00 ± 0.00", "1.50e-03 ± 0.0e+00", "4.50e-03 ± 0.0e+00"]
    assert layers.rows[2][2:] == ["15.00", "30.00", "1.50e-03", "4.50e-03"]
    assert matrices.head[2:4] == ["head, relative, %", "query, relative, %"]
    assert matrices.rows[1][2:] == ["90.00 ± 0.00", "22.50 ± 0.00", "9.00e-03 ± 0.0e+00", "3.00e-03 ± 0.0e+00"]
    assert rounds.head[2:6] == [f"round {r}, relative, %" for r in (1, 2, 3, 4)]
    assert rounds.rows[0][2:6] == ["30.00 ± 0.00", "40.00 ± 0.00", "50.00 ± 0.00", "60.00 ± 0.00"]
    for row in rows.values():
        row["rounds"] = row["rounds"] * 5
        row["scaled_deviation"] = [{} for _ in row["rounds"]]
    many = grid_deviations.by_round(gather(GRID, rows)[0])
    assert many.head[2:] == [f"round {r}, relative, %" for r in (1, 4, 6, 9, 12, 15, 17, 20)]


def test_differences_round_by_round_are_paired_over_seeds() -> None:
    rows = synthetic_rows()
    gains = {0: (0.05, 0.04, 0.06), 2: (0.01, -0.01, 0.0), 3: (0.02, 0.02, 0.03)}
    for row in rows.values():
        if row["method"] == "replication":
            for r, gain in gains.items():
                row["rounds"][r]["validation"]["accuracy"] += gain[row["seed"]]
    (results,) = gather(GRID, rows)
    table = by_round(results)
    assert table.head == ["after round", "replication"]
    assert [row[0] for row in table.rows] == ["1", "3", "4"], "the second round was not evaluated"

    def accuracy(method: str, seed: int) -> float:
        return mean(ACCURACY[method, data][seed] for data in ("first_set", "second_set"))

    for (r, gain), row in zip(gains.items(), table.rows, strict=True):
        ours = [accuracy("replication", seed) - 0.1 * (3 - r) + gain[seed] for seed in range(3)]
        difference = paired(ours, [accuracy("zero padding", seed) - 0.1 * (3 - r) for seed in range(3)])
        assert difference is not None
        low, high = 100 * difference.low, 100 * difference.high
        assert row[1] == f"{100 * difference.mean:+.2f} ({low:+.2f} to {high:+.2f}, p {difference.p:.3f})"


@pytest.mark.parametrize("draw", [grid_figures.deviation, grid_figures.deviation_by_round])
def test_panels_of_deviation_share_a_scale_that_holds_all_of_them(
    draw: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = synthetic_rows()
    for row in rows.values():
        if row["test"]["accuracy"] >= 0.69:  # the second panel
            for record in row["rounds"]:
                record["deviation"] = {module: 7 * value for module, value in record["deviation"].items()}
    figures = []
    monkeypatch.setattr(grid_figures, "save", lambda figure, *_: figures.append(figure) or [])
    draw(gather(GRID, rows)[0], tmp_path)
    assert len(figures) == 2
    for figure in figures:
        panels = [axes for axes in figure.axes if axes.lines]
        assert len({axes.get_ylim() for axes in panels}) == 1
        for axes in panels:
            low, high = axes.get_ylim()
            assert low == 0
            assert max(max(line.get_ydata()) for line in axes.lines) <= high


def test_values_that_all_columns_share_are_in_the_title() -> None:
    shown = GRID.model_dump() | {"experiments": {}}
    shown["experiments"]["one"] = {"axes": {"method": "all", "data": "first_set"}, "rows": "method", "title": "One"}
    grid = Grid.model_validate(shown)
    assert gather(grid, synthetic_rows())[0].title == "One, AG & News_4 %"
    assert gather(GRID, synthetic_rows())[0].title == "Main"


def test_short_names_of_modules_are_unique_within_a_layer() -> None:
    names = [f"bert.encoder.layer.0.{name}.dense" for name in ("attention.output", "intermediate", "output")]
    assert short_names(names) == ["0 attention.output.dense", "0 layer.intermediate.dense", "0 layer.output.dense"]
    assert short_names(["h.0.attn.c_proj", "h.1.attn.c_proj"]) == ["0 c_proj", "1 c_proj"]


def test_layer_ten_comes_after_layer_two() -> None:
    names = [f"encoder.layer.{i}.{name}" for i in range(12) for name in ("key", "query")]
    assert in_depth(sorted(names)) == names
    assert sorted(names) != names


def test_an_experiment_without_results_is_left_out(tmp_path: Path) -> None:
    some: dict[str, Any] = {"other": {"lora_parameters": {}, **next(iter(synthetic_rows().values()))}}
    tables, page = write_grid_report(GRID, some, tmp_path)
    assert tables == []
    assert "Main" not in page.read_text()


def test_labels_name_rows_and_columns() -> None:
    labels = {"zero padding": "Zeros", "first_set": "First"}
    (results,) = gather(GRID.model_copy(update={"labels": labels}), synthetic_rows())
    table = final(results)
    assert table.head[1] == "First"
    assert "Zeros" in rows_of(table)
    assert "against Zeros" in table.note
