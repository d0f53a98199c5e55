"""Report of a grid: tables, figures, and one page with all of them, made from the grid's Parquet file alone."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from fedelta.errors import FedeltaError, quantity
from fedelta.federation.records import Inputs
from fedelta.files import write_file
from fedelta.runs.identity import differing_inputs
from fedelta.runs.report.text_table import TextTable
from fedelta.sweep.cells import Expansion, Place, Tuned, chosen_by
from fedelta.sweep.grid import Grid, View, load_grid
from fedelta.sweep.report import deviations as grid_deviations
from fedelta.sweep.report import differences as grid_differences
from fedelta.sweep.report import figures as grid_figures
from fedelta.sweep.report import scores as grid_scores
from fedelta.sweep.report import traffic_and_ranks as grid_tables
from fedelta.sweep.report.results import Results, gather, places
from fedelta.sweep.results import FILE, Row, late_score, metric_of, read_rows, score, stored_inputs

TABLES: Mapping[View, Callable[[Results], TextTable]] = {
    "score": grid_scores.final,
    "late-score": grid_scores.late,
    "all-scores": grid_scores.all_scores,
    "by-axis": grid_differences.by_axis,
    "rounds-to-target": grid_scores.rounds_to_target,
    "traffic": grid_tables.traffic,
    "energy": grid_tables.energy,
    "first-aggregation": grid_tables.first_aggregation,
    "high-rank-clients": grid_tables.high_rank_clients,
    "deviation": grid_deviations.deviation,
    "deviation-by-layer": grid_deviations.by_layer,
    "deviation-by-matrix": grid_deviations.by_matrix,
    "deviation-by-round": grid_deviations.by_round,
    "difference-by-round": grid_differences.by_round,
}
FIGURES: Mapping[View, Callable[[Results, Path], list[Path]]] = {
    "curves": grid_figures.curves,
    "energy": grid_figures.energy,
    "deviation": grid_figures.deviation,
    "deviation-by-round": grid_figures.deviation_by_round,
    "difference-by-round": grid_figures.difference_by_round,
}


def open_grid(folder: Path) -> tuple[Grid, dict[str, Row]]:
    """Read the grid and the rows that a folder of results holds.

    Raises:
        FedeltaError: if the folder has no results.
    """
    rows = read_rows(folder)
    if not rows:
        raise FedeltaError(f"{folder}: no {FILE} in this folder")
    return load_grid(folder / "grid.yaml"), rows


def write_grid_report(grid: Grid, rows: Mapping[str, Row], folder: Path) -> tuple[list[TextTable], Path]:
    """Write `tables/`, `figures/` and `report.md` into the folder.

    Returns:
        The tables, and the path of the page.
    """
    ran = places(grid, rows)
    own = {place.key: rows[place.key] for place in ran}
    parts = [f"# {grid.name}{', ' + grid.size if grid.size else ''}", provenance(own, len(rows) - len(own))]
    tables = []
    if grid.tuning is not None:
        tables.append(tuning_table(grid, rows))
        tables[0].write(folder / "tables")
        parts += ["## Tuning", tables[0].markdown(), tables[0].note]
    for results in gather(grid, rows):
        if results.cells.empty:
            continue
        parts.append(f"## {results.title}")
        if results.missing:
            verb = "is" if results.missing == 1 else "are"
            parts.append(f"{quantity(results.missing, 'run')} of this experiment {verb} still missing.")
        for view in results.experiment.show:
            if view in TABLES:
                table = TABLES[view](results)
                tables.append(table)
                table.write(folder / "tables")
                parts += [f"**{table.title}**", table.markdown(), table.note]
            if view in FIGURES:
                paths = FIGURES[view](results, folder / "figures")
                parts += [f"![{results.title}: {view}](figures/{p.name})" for p in paths if p.suffix == ".svg"]
    parts.append("[cells.md](cells.md) lists every run by the name that `fedelta sweep --check` takes.")
    write_file(folder / "cells.md", _cells(grid, ran, rows))
    write_file(folder / "report.md", "\n\n".join(part.strip() for part in parts) + "\n")
    return tables, folder / "report.md"


def tuning_table(grid: Grid, rows: Mapping[str, Row]) -> TextTable:
    """Tabulate the validation score of every candidate of the tuning, with the chosen ones marked."""
    assert grid.tuning is not None
    _, trials = Expansion(grid).trials()
    chosen = chosen_by(grid, trials, rows) or {}
    names = [key.rpartition(".")[2].replace("_", " ") for key in grid.tuning.search]
    candidates = list(dict.fromkeys(tuple(trial.choice.values()) for trial in trials))
    head = [", ".join(grid.tuning.axes)]
    head += [
        ", ".join(f"{n} {v:g}" if isinstance(v, float) else f"{n} {v}" for n, v in zip(names, c, strict=True))
        for c in candidates
    ]
    lines: dict[Tuned, list[str]] = {}
    for trial in trials:
        scores = [late_score(rows[key], grid.tuning.last) for key in trial.keys if key in rows]
        text = "–"
        if scores:
            metric = next(metric_of(rows[key]) for key in trial.keys if key in rows)
            digits = 2 if metric.percent else 4
            text = f"{metric.factor * sum(s or 0 for s in scores) / len(scores):.{digits}f}"
            text = "diverged" if None in scores else text
        if chosen.get(trial.values) == trial.choice:
            text = f"{text} *"
        lines.setdefault(trial.values, [grid.labels_of(trial.values)]).append(text)
    at = f", {grid.labels_of(grid.tuning.at.values())}" if grid.tuning.at else ""
    seeds = ", ".join(map(str, grid.tuning.seeds))
    note = (
        f"Validation score (% where it is a share), mean of the last {grid.tuning.last:.0%} of evaluations{at}, "
        f"seeds {seeds}. With a star what was chosen, and is used everywhere."
    )
    return TextTable("tuning", "Candidates", head, list(lines.values()), note)


def _cells(grid: Grid, ran: Sequence[Place], rows: Mapping[str, Row]) -> str:
    """Tabulate every run with its place in the grid and its scores."""
    lines = []
    for place in ran:
        row = rows[place.key]
        scores = [metric_of(row).format(score(row, s)) if row[s] else "–" for s in ("validation", "test")]
        values = grid.labels_of(place.values.values())
        lines.append([place.key, place.experiment, values, str(place.seed), *scores, row["failed"] or ""])
    head = ["cell", "experiment", "values", "seed", "validation", "test", "diverged"]
    return TextTable("cells", "Cells", head, lines).markdown()


def _differing_inputs(rows: Iterable[Row]) -> list[str]:
    """Names of the parts in which cells differ that name the same data and the same model."""
    alike: dict[str, list[Inputs]] = {}
    for row in rows:
        config = json.loads(row["config"])
        named = json.dumps([config.get(part) for part in ("data", "model", "task", "partition")], sort_keys=True)
        alike.setdefault(named, []).append(stored_inputs(row))
    return list(dict.fromkeys(part for inputs in alike.values() for part in differing_inputs(inputs)))


def provenance(rows: Mapping[str, Row], others: int = 0) -> str:
    """Summarize in one paragraph how many runs there are, when and where they ran, and with which versions.

    Args:
        rows: the rows of the grid.
        others: number of further rows in the file, from an earlier form of the grid.
    """
    if not rows:
        return f"None of the runs of this grid; the file holds {quantity(others, 'other run')}."
    machines = sorted({row["machine"] for row in rows.values()})
    libraries = [{name: v for name, v in row["versions"].items() if v and name != "commit"} for row in rows.values()]
    distinct = sorted({json.dumps(versions, sort_keys=True) for versions in libraries})
    versions = [", ".join(f"{name} {v}" for name, v in json.loads(text).items()) for text in distinct]
    commits = Counter(row["versions"].get("commit") for row in rows.values())
    code = ", ".join(f"{commit} ({quantity(count, 'run')})" for commit, count in commits.most_common() if commit)
    hours = sum(row["seconds"] or 0 for row in rows.values()) / 3600
    failed = sum(row["failed"] is not None for row in rows.values())
    days = sorted({row["finished"][:10] for row in rows.values()})
    lost = sum(r["sampled"] - r["clients"] for row in rows.values() for r in row["rounds"])
    differing = _differing_inputs(rows.values())
    warning = f" These runs differ in their {', '.join(differing)}." if differing else ""
    counts = [
        quantity(len(rows), "run"),
        *([f"{failed} of them diverged"] if failed else []),
        *([quantity(others, "other")] if others else []),
    ]
    return (
        f"{', '.join(counts)}; {quantity(lost, 'update')} of clients {'was' if lost == 1 else 'were'} lost or refused. "
        f"{hours:.2f} hours of rounds, summed over runs side by side, "
        f"{days[0]}{' to ' + days[-1] if days[-1] != days[0] else ''}, on {'; '.join(machines)}. "
        f"Versions: {'; '.join(versions)}.{f' Commits: {code}.' if code else ''}"
        f"{warning}"
    )
