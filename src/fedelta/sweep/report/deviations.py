"""Tables of what averaging A and B apart would lose: as a whole, by depth, by matrix, by round."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import mean

from fedelta.runs.report.statistics import spread, spread_of_small
from fedelta.runs.report.text_table import TextTable
from fedelta.sweep.report.results import Results, deviations, mean_by, mean_deviation

KINDS = {"relative": "relative, %", "scaled": "scaled"}
MOST = 8
"""Columns of each kind: of more layers or rounds some, with the first and the last."""


def deviation(results: Results) -> TextTable:
    """What averaging the factors apart would lose, mean over modules and rounds."""
    cells = [cell for row in results.rows for panel in results.panels for cell in results.trained(row, panel).values()]
    kinds = [kind for kind in KINDS if any(any(deviations(cell, kind)) for cell in cells)]
    head = [results.experiment.rows]
    head += [f"{panel.label} {KINDS[kind]}".strip() for panel in results.panels for kind in kinds]
    lines = []
    for row in results.rows:
        line = [results.label(row)]
        for panel in results.panels:
            for kind in kinds:
                line.append(
                    _spread(list(results.values(row, panel, partial(mean_deviation, kind=kind)).values()), kind)
                )
        lines.append(line)
    note = (
        "What averaging A and B apart would lose in a round: ‖ΔW − B̄Ā‖_F of a module relative to ‖ΔW‖_F, and (scaled) "
        "divided by √(m·n); mean over modules and rounds ± standard deviation over seeds. ΔW is the mean product of "
        "the whole adapters: all that was learned since the adapter was last merged into the base, which some methods "
        "do every round; the relative deviation compares methods of one kind alone."
    )
    return TextTable(f"{results.name}-deviation", f"{results.title}: deviation", head, lines, note)


def by_layer(results: Results) -> TextTable:
    """The same from the first layer to the last: the first number in a module's name."""
    return _table(results, "layer", lambda _, module: next((p for p in module.split(".") if p.isdigit()), None))


def by_matrix(results: Results) -> TextTable:
    """The same by a module's name within its layer."""
    return _table(results, "matrix", lambda _, module: _matrix(module))


def by_round(results: Results) -> TextTable:
    """The same from the first round to the last."""
    return _table(results, "round", lambda number, _: str(number))


def _matrix(module: str) -> str:
    """What comes after the last number in a module's name: `layer.0.attention.query` → `attention.query`."""
    parts = module.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :]) or module


def _table(results: Results, what: str, key: Callable[[int, str], str | None]) -> TextTable:
    """A line for each row in each column of the other tables, and for all of them; without those that lose nothing.

    Args:
        key: of a round, counted from 1, and a module; None leaves it out.
    """
    measured = {
        (row, panel): [
            {kind: mean_by([deviations(cell, kind)], key) for kind in KINDS}
            for cell in results.trained(row, panel).values()
        ]
        for row in results.rows
        for panel in results.panels
    }
    every = [means for cells in measured.values() for means in cells]
    columns = {kind: _some({name for means in every for name in means[kind]}) for kind in KINDS}
    wholes = [(panel.label or "all", [panel]) for panel in results.panels]
    if len(results.panels) > 1:
        wholes.append(("all", results.panels))
    lines = []
    for row in results.rows:
        for label, panels in wholes:
            found = [means for panel in panels for means in measured[row, panel]]
            if any(any(by_key.values()) for means in found for by_key in means.values()):
                line = [results.label(row), label]
                for kind, names in columns.items():
                    values = [[means[kind][name] for means in found if name in means[kind]] for name in names]
                    line += [_spread(of, kind, len(panels)) for of in values]
                lines.append(line)
    head = [results.experiment.rows, "column"]
    for kind, names in columns.items():
        head += [f"{what} {name}, {KINDS[kind]}" if name.isdigit() else f"{name}, {KINDS[kind]}" for name in names]
    note = (
        "‖ΔW − B̄Ā‖_F of a module in a round, relative to ‖ΔW‖_F and scaled by 1/√(m·n): mean over all else ± standard "
        "deviation over seeds (over all columns the mean alone). Methods that lose nothing are left out."
    )
    return TextTable(f"{results.name}-deviation-by-{what}", f"{results.title}: deviation by {what}", head, lines, note)


def _some(names: Iterable[str]) -> list[str]:
    """In order; of many numbers some."""
    found = sorted(names, key=lambda name: (len(name) if name.isdigit() else 0, name))
    if len(found) <= MOST or not all(map(str.isdigit, found)):
        return found
    return [found[round(i * (len(found) - 1) / (MOST - 1))] for i in range(MOST)]


def _spread(values: Sequence[float], kind: str, panels: int = 1) -> str:
    if panels > 1 and values:
        values = [mean(values)]
    return spread(values, 100, 2) if kind == "relative" else spread_of_small(values)
