"""Tables of what averaging A and B apart would lose: as a whole, by depth, by matrix, by round."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import mean

from fedelta.report.grid_results import Results, deviations, mean_deviation
from fedelta.report.statistics import spread, spread_of_small
from fedelta.report.tables import TextTable
from fedelta.sweep.results import Row

KINDS = {"relative": "relative, %", "scaled": "scaled"}
MOST = 8
"""Columns of each kind: of more layers or rounds some, with the first and the last."""


def deviation(results: Results) -> TextTable:
    """What averaging the factors apart would lose, mean over modules and rounds."""
    kinds = _kinds(results)
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
    return _table(results, "matrix", lambda _, module: matrix(module))


def by_round(results: Results) -> TextTable:
    """The same from the first round to the last."""
    return _table(results, "round", lambda number, _: str(number))


def matrix(module: str) -> str:
    """What comes after the last number in a module's name: `layer.0.attention.query` → `attention.query`."""
    parts = module.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :]) or module


def _table(results: Results, what: str, key: Callable[[int, str], str | None]) -> TextTable:
    """A line for each row in each column of the other tables, and for all of them; without those that lose nothing.

    Args:
        key: of a round, counted from 1, and a module; None leaves it out.
    """
    kinds = _kinds(results)
    lines, columns = [], {kind: _some(_keys(results, kind, key), what) for kind in kinds}
    wholes = [(panel.label or "all", [panel]) for panel in results.panels]
    if len(results.panels) > 1:
        wholes.append(("all", results.panels))
    for row in results.rows:
        for label, panels in wholes:
            found = {
                kind: [_means(cell, kind, key) for panel in panels for cell in results.trained(row, panel).values()]
                for kind in kinds
            }
            if any(any(means.values()) for cells in found.values() for means in cells):
                line = [results.label(row), label]
                for kind in kinds:
                    line += [_spread([m[c] for m in found[kind] if c in m], kind, len(panels)) for c in columns[kind]]
                lines.append(line)
    head = [results.experiment.rows, "column"]
    prefix = "" if what == "matrix" else f"{what} "
    head += [f"{prefix}{column}, {KINDS[kind]}" for kind in kinds for column in columns[kind]]
    note = (
        "‖ΔW − B̄Ā‖_F of a module in a round, relative to ‖ΔW‖_F and scaled by 1/√(m·n): mean over all else ± standard "
        "deviation over seeds (over all columns the mean alone). Methods that lose nothing are left out."
    )
    return TextTable(f"{results.name}-deviation-by-{what}", f"{results.title}: deviation by {what}", head, lines, note)


def _kinds(results: Results) -> list[str]:
    """Those that were measured."""
    cells = [cell for row in results.rows for panel in results.panels for cell in results.trained(row, panel).values()]
    return [kind for kind in KINDS if any(any(deviations(cell, kind)) for cell in cells)]


def _keys(results: Results, kind: str, key: Callable[[int, str], str | None]) -> list[str]:
    cells = [cell for row in results.rows for panel in results.panels for cell in results.trained(row, panel).values()]
    return list(dict.fromkeys(name for cell in cells for name in _means(cell, kind, key)))


def _some(keys: Iterable[str], what: str) -> list[str]:
    found = sorted(keys, key=lambda name: (len(name) if name.isdigit() else 0, name))
    if what == "matrix" or len(found) <= MOST:
        return found
    return [found[round(i * (len(found) - 1) / (MOST - 1))] for i in range(MOST)]


def _means(row: Row, kind: str, key: Callable[[int, str], str | None]) -> Mapping[str, float]:
    """Key → mean over the modules and rounds of a run that have it."""
    found: dict[str, list[float]] = {}
    for number, by_module in enumerate(deviations(row, kind), 1):
        for module, value in by_module.items():
            name = key(number, module)
            if name is not None:
                found.setdefault(name, []).append(value)
    return {name: mean(values) for name, values in found.items()}


def _spread(values: Sequence[float], kind: str, panels: int = 1) -> str:
    if panels > 1 and values:
        values = [mean(values)]
    return spread(values, 100, 2) if kind == "relative" else spread_of_small(values)
