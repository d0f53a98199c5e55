"""The plot of a comparison: curves over rounds, or one point for each method if there is only one evaluated round."""

from typing import Any

from fedelta.runs.comparison import comparison_configs, run_comparison
from fedelta.runs.report.plot import plot_scores


def text_of_plot(tiny_config: Any, rounds: int) -> str:
    configs = comparison_configs(tiny_config(rounds=rounds), ("replication", "fedex"), 2)
    runs = run_comparison(configs, False, None)
    svg, _ = plot_scores(runs, runs[0].folder.path.parent)
    return svg.read_text()


def test_a_single_round_is_drawn_as_one_point_for_each_method(tiny_config: Any) -> None:
    text = text_of_plot(tiny_config, 1)
    assert ">round<" not in text
    assert all(f">{method}<" in text for method in ("replication", "fedex"))


def test_several_rounds_are_drawn_as_curves(tiny_config: Any) -> None:
    text = text_of_plot(tiny_config, 2)
    assert ">round<" in text
    assert all(f">{method}<" in text for method in ("replication", "fedex"))
