"""Tables of the loss from averaging A and B separately: in total, by layer, by matrix, by round."""

from collections.abc import Callable, Iterable, Sequence
from statistics import mean

import pandas as pd

from fedelta.runs.report.statistics import spread, spread_of_small
from fedelta.runs.report.text_table import TextTable
from fedelta.sweep.report.results import Panel, Results

KINDS = {"relative": "relative, %", "scaled": "scaled"}
MAX_COLUMNS = 8
"""Columns of each kind. If there are more layers or rounds, some are chosen, with the first and the last."""


def deviation(results: Results) -> TextTable:
    """Tabulate the loss from averaging the factors separately, mean over modules and rounds."""
    by_seed = {kind: results.mean_deviation(kind) for kind in KINDS if not results.deviations(kind).empty}
    head = [results.experiment.rows]
    head += [f"{panel.label} {KINDS[kind]}".strip() for panel in results.panels for kind in by_seed]

    def texts(row: str, panel: Panel) -> list[str]:
        return [_spread(values.loc[(row, panel), :].dropna(), kind) for kind, values in by_seed.items()]

    note = (
        "What averaging A and B apart would lose in a round: ‖ΔW − B̄Ā‖_F of a module relative to ‖ΔW‖_F, and (scaled) "
        "divided by √(m·n); mean over modules and rounds ± standard deviation over seeds. ΔW is the mean product of "
        "the whole adapters: all that was learned since the adapter was last merged into the base, which some methods "
        "do every round; the relative deviation compares methods of one kind alone."
    )
    name, title = f"{results.name}-deviation", f"{results.title}: deviation"
    return TextTable(name, title, head, results.lines(texts), note)


def by_layer(results: Results) -> TextTable:
    """Tabulate the deviation by layer, the first number in a module's name."""
    return _table(results, "layer", lambda _, module: next((p for p in module.split(".") if p.isdigit()), None))


def by_matrix(results: Results) -> TextTable:
    """Tabulate the deviation by a module's name within its layer."""
    return _table(results, "matrix", lambda _, module: _matrix(module))


def by_round(results: Results) -> TextTable:
    """Tabulate the deviation by round."""
    return _table(results, "round", lambda number, _: str(number))


def _matrix(module: str) -> str:
    """The part of a module's name after its last number: `layer.0.attention.query` → `attention.query`."""
    parts = module.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :]) or module


def _table(results: Results, by: str, key: Callable[[int, str], str | None]) -> TextTable:
    """Tabulate deviations with a line per row and panel, and one per row for all panels; zero lines are left out.

    Args:
        by: the noun that the columns are named by.
        key: (round from 1, module) → the column that a deviation belongs to; None leaves it out.
    """
    means = pd.concat({kind: _means(results.deviations(kind), key) for kind in KINDS}, axis=1)
    columns = {kind: _selection(means[kind].columns) if kind in means else [] for kind in KINDS}
    groups = [(panel.label or "all", [panel]) for panel in results.panels]
    if len(results.panels) > 1:
        groups.append(("all", results.panels))
    lines = []
    for row in results.rows:
        for label, panels in groups:
            mine = means[(means.index.get_level_values("row") == row) & means.index.isin(panels, level="panel")]
            if not mine.fillna(0.0).any(axis=None):
                continue
            line = [results.label(row), label]
            for kind, names in columns.items():
                line += [_spread(mine[kind, name].dropna(), kind, len(panels)) for name in names]
            lines.append(line)
    head = [results.experiment.rows, "column"]
    for kind, names in columns.items():
        head += [f"{by} {name}, {KINDS[kind]}" if name.isdigit() else f"{name}, {KINDS[kind]}" for name in names]
    note = (
        "‖ΔW − B̄Ā‖_F of a module in a round, relative to ‖ΔW‖_F and scaled by 1/√(m·n): mean over all else ± standard "
        "deviation over seeds (over all columns the mean alone). Methods that lose nothing are left out."
    )
    return TextTable(f"{results.name}-deviation-by-{by}", f"{results.title}: deviation by {by}", head, lines, note)


def _means(deviations: pd.DataFrame, key: Callable[[int, str], str | None]) -> pd.DataFrame:
    """Mean deviation of each run by key: the index is (row, panel, seed), with a column per key."""
    keys = [key(number, module) for number, module in zip(deviations["round"], deviations["module"], strict=True)]
    return deviations.assign(key=keys).pivot_table("value", ["row", "panel", "seed"], "key", "mean")


def _selection(names: Iterable[str]) -> list[str]:
    """Names in order; of more than `MAX_COLUMNS` numbers, an even selection."""
    ordered = sorted(names, key=lambda name: (len(name) if name.isdigit() else 0, name))
    if len(ordered) <= MAX_COLUMNS or not all(map(str.isdigit, ordered)):
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (MAX_COLUMNS - 1))] for i in range(MAX_COLUMNS)]


def _spread(values: Sequence[float], kind: str, panels: int = 1) -> str:
    """Mean ± standard deviation as text; over several panels the mean alone."""
    values = list(values)
    if panels > 1 and values:
        values = [mean(values)]
    return spread(values, 100, 2) if kind == "relative" else spread_of_small(values)
