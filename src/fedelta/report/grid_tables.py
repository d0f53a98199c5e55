"""Tables of a grid's experiments."""

import json
from collections.abc import Callable
from statistics import mean

from fedelta.config import parse_config
from fedelta.corpus import client_names
from fedelta.packing import ByteCount
from fedelta.ranks import initial_ranks, quota
from fedelta.report.grid_results import (
    LATE,
    Measure,
    Panel,
    Results,
    final_score,
    late_validation,
    rounds_to,
    shares_of_energy,
)
from fedelta.report.statistics import paired, spread
from fedelta.report.table import MB, REACH
from fedelta.report.tables import TextTable
from fedelta.sweep.results import Row


def final(results: Results) -> TextTable:
    """Test score of the final model."""
    note = f"Final model on the test split, {_headings(results)}: mean ± standard deviation over seeds."
    return _compared(results, "score", final_score, f"test {_titles(results)}", note)


def late(results: Results) -> TextTable:
    """Validation score, mean of the last evaluations."""
    what = f"mean of the last {LATE:.0%} of evaluations"
    note = f"Validation {_headings(results)}, {what}: mean ± standard deviation over seeds."
    return _compared(results, "late-score", late_validation, f"late validation {_titles(results)}", note)


def _titles(results: Results) -> str:
    return " or ".join(metric.title for metric in results.metrics)


def _headings(results: Results) -> str:
    return " or ".join(metric.heading for metric in results.metrics)


def _compared(results: Results, name: str, measure: Measure, title: str, note: str) -> TextTable:
    """A column a panel, with the test against the baseline; last the differences of all panels together."""
    head = [results.experiment.rows]
    metrics = {panel: results.metric(panel) for panel in results.panels}
    different = len(results.metrics) > 1
    head += [f"{p.label}, {metrics[p].title}" if different else p.label or title for p in results.panels]
    # What is better must be more in all of them, or less.
    several = len(results.panels) > 1 and len({(metric.factor, metric.lower) for metric in results.metrics}) == 1
    if several:
        head += ["all: difference", "95 % interval", "p", "pairs"]
    lines = []
    for row in results.rows:
        line = [results.label(row)]
        for panel in results.panels:
            line.append(_with_failures(results, row, panel, measure) + _p(results, row, panel, measure))
        if several:
            line += _difference(results, row, measure)
        lines.append(line)
    if len(results.seeds) > 1:
        baseline = results.label(results.baseline)
        note += f" In brackets p of a paired t-test against {baseline} over seeds, not corrected for their number"
        note += "; all: pairs of column and seed, taken as independent." if several else "."
        note += " What diverged is in no mean and no test."
    return TextTable(f"{results.name}-{name}", f"{results.title}: {title}", head, lines, note)


def _with_failures(results: Results, row: str, panel: Panel, measure: Measure) -> str:
    metric = results.metric(panel)
    values = list(results.values(row, panel, measure).values())
    text = spread(values, metric.factor, 2 if metric.percent else 3)
    failed = len(results.cells.get((row, panel), {})) - len(results.trained(row, panel))
    return f"{text}, {failed} diverged" if failed else text


def _p(results: Results, row: str, panel: Panel, measure: Measure) -> str:
    found = None if row == results.baseline else paired(*results.pairs(row, [panel], measure))
    return "" if found is None else f" ({found.p:.3f})"


def _difference(results: Results, row: str, measure: Measure) -> list[str]:
    ours, theirs = results.pairs(row, results.panels, measure)
    found = None if row == results.baseline else paired(ours, theirs)
    if found is None:
        return ["", "", "", ""]
    factor = results.metrics[0].factor
    interval = f"{factor * found.low:+.2f} to {factor * found.high:+.2f}"
    return [f"{factor * found.mean:+.2f}", interval, f"{found.p:.3f}", str(found.pairs)]


def rounds_to_target(results: Results) -> TextTable:
    """Rounds until the validation score reached the target."""
    targets = {panel: target for panel in results.panels if (target := results.target(panel)) is not None}
    head = [results.experiment.rows]
    head += [f"{panel.label} to {results.metric(panel).show(target, 1)}".strip() for panel, target in targets.items()]
    lines = []
    for row in results.rows:
        line = [results.label(row)]
        for panel, target in targets.items():
            ran = results.cells.get((row, panel), {})
            hits = list(results.values(row, panel, rounds_to(target)).values())
            missed = f", {len(hits)} of {len(ran)}" if 0 < len(hits) < len(ran) else ""
            line.append(spread(hits, digits=1) + missed if hits or not ran else "not reached")
        lines.append(line)
    note = (
        "Finished rounds when the validation score first was at the target, and how many of the seeds reached it where "
        f"not all did. The target is evaluation.target, or {100 * REACH:.0f} % of the column's best final score."
    )
    return TextTable(f"{results.name}-rounds-to-target", f"{results.title}: rounds to target", head, lines, note)


def traffic(results: Results) -> TextTable:
    """Parameters and measured bytes of a client in a round."""
    panels = _by_model(results)
    head = [results.experiment.rows]
    for panel in panels:
        label = panel.label if len(results.panels) > 1 else ""
        head += [f"{label} LoRA parameters".strip(), "adapter down, MB", "adapter up, MB", "patch down, MB", "all, MB"]
    lines = []
    for row in results.rows:
        line = [results.label(row)]
        for panel in panels:
            cells = list(results.trained(row, panel).values())
            line += [_averaged(cells, measure) for measure in _TRAFFIC] if cells else ["–"] * len(_TRAFFIC)
        lines.append(line)
    note = (
        "A client in a round, mean over those that were sent something: LoRA parameters at the ranks of the last "
        "round, and 10⁶ bytes as serialised. All: both directions, with heads and overhead."
    )
    return TextTable(f"{results.name}-traffic", f"{results.title}: parameters and bytes a client", head, lines, note)


def _by_model(results: Results) -> list[Panel]:
    """The first panel of each model and of each way in which ranks are given out: data change no bytes."""
    found: dict[str, Panel] = {}
    for panel in results.panels:
        cells = [cell for row in results.rows for cell in results.trained(row, panel).values()]
        if cells:
            config = json.loads(cells[0]["config"])
            differing = [config[name] for name in ("model", "lora", "ranks", "federation")]
            found.setdefault(json.dumps(differing), panel)
    return list(found.values())


def lora_parameters(row: Row) -> float:
    """Of a client, mean over all clients at the end."""
    ranks = row["rounds"][-1]["ranks"]
    return sum(row["lora_parameters"][rank] * count for rank, count in ranks.items()) / sum(ranks.values())


def _bytes(direction: str, part: str) -> Callable[[Row], float]:
    def measure(row: Row) -> float:
        return sum(r[direction][part] for r in row["rounds"]) / sum(r["sampled"] for r in row["rounds"])

    return measure


def _all_bytes(row: Row) -> float:
    return sum(_bytes(direction, part)(row) for direction in ("down", "up") for part in ByteCount._fields)


_TRAFFIC: list[tuple[Callable[[Row], float], float, int]] = [
    (lora_parameters, 1, 0),
    (_bytes("down", "adapter"), MB, 3),
    (_bytes("up", "adapter"), MB, 3),
    (_bytes("down", "patch"), MB, 3),
    (_all_bytes, MB, 3),
]


def _averaged(cells: list[Row], measure: tuple[Callable[[Row], float], float, int]) -> str:
    function, unit, digits = measure
    return f"{mean(function(cell) for cell in cells) / unit:,.{digits}f}"


def energy(results: Results) -> TextTable:
    """The energy that is left above the lowest rank."""
    head = [results.experiment.rows]
    head += [panel.label or "share, %" for panel in results.panels]
    lines = []
    for row in results.rows:
        line = [results.label(row)]
        for panel in results.panels:
            found = [_above_lowest(cell) for cell in results.trained(row, panel).values()]
            line.append(spread([share for share in found if share is not None], 100, 1))
        lines.append(line)
    note = (
        "Share of the adapter's energy Σ‖b_j a_j‖² in rank indices above the lowest rank of any client, last round, "
        "%; a dash where all ranks are equal, or the adapter has just been merged into the base."
    )
    return TextTable(f"{results.name}-energy", f"{results.title}: energy above the lowest rank", head, lines, note)


def _above_lowest(row: Row) -> float | None:
    ranks = [int(rank) for record in row["rounds"] for rank in record["ranks"]]
    shares = shares_of_energy(row)[-1]
    if min(ranks) == max(ranks) or not any(shares):
        return None
    # HetLoRA's clients may prune themselves below the rank that they were given.
    lowest = min(int(rank) for rank in row["rounds"][0]["ranks"])
    return sum(shares[lowest:])


def first_aggregation(results: Results) -> TextTable:
    """High-rank clients before and after the first aggregation."""
    head = [results.experiment.rows]
    for panel in results.panels:
        head += [f"{panel.label} {when}".strip() for when in ("before", "after", "change")]
    lines = []
    for row in results.rows:
        line = [results.label(row)]
        for panel in results.panels:
            cells = results.trained(row, panel)
            both = [found for cell in cells.values() if (found := _first_aggregation(cell)) is not None]
            before, after = [own for own, _ in both], [mean for _, mean in both]
            change = [b - a for a, b in zip(before, after, strict=True)]
            line += [spread(values, results.metric(panel).factor) for values in (before, after, change)]
        lines.append(line)
    note = (
        f"Validation {_headings(results)}, mean ± standard deviation over seeds: of the models of the clients with the "
        "highest rank after their first local training, and of the global model that they get back."
    )
    return TextTable(f"{results.name}-first-aggregation", f"{results.title}: first aggregation", head, lines, note)


def _first_aggregation(row: Row) -> tuple[float, float] | None:
    """Score of the highest-rank clients' own models, and of the global one; None if one was not evaluated."""
    own, after = row["rounds"][0]["own"], row["rounds"][0]["validation"]
    if not own or after is None:
        return None
    high = max(client["rank"] for client in own)
    return mean(client["score"] for client in own if client["rank"] == high), after[row["metric"]]


def high_rank_clients(results: Results) -> TextTable:
    """How many of the clients that came to have the high rank hold balanced classes (partition `two-quality`)."""
    head = [results.experiment.rows]
    for panel in results.panels:
        head += [f"{panel.label} {what}".strip() for what in ("with the high rank", "of them balanced, %")]
    lines = []
    for row in results.rows:
        line = [results.label(row)]
        for panel in results.panels:
            ranked = [_high_ranks(cell) for cell in results.trained(row, panel).values()]
            found = [pair for pair in ranked if pair is not None]
            line.append(spread([float(high) for high, _ in found], digits=1))
            line.append(spread([balanced / high for high, balanced in found if high], 100, 0))
        lines.append(line)
    note = (
        "Clients that were given the high rank, and the share of them whose classes are balanced; a dash where the "
        "partition is not two-quality."
    )
    return TextTable(f"{results.name}-high-rank-clients", f"{results.title}: who has the high rank", head, lines, note)


def _high_ranks(row: Row) -> tuple[int, int] | None:
    """Clients that were given the high rank, and how many of them are among the balanced ones, which come first."""
    config = parse_config(json.loads(row["config"]))
    if config.partition.kind != "two-quality":
        return None
    names = client_names(row["clients"])
    first = initial_ranks(names, config.ranks, row["seed"])
    high = {name for name in names if first[name] == config.ranks.high}
    high |= {name for record in row["rounds"] for name in record["promoted"]}
    balanced = set(names[: quota(config.partition.share, len(names))])
    return len(high), len(high & balanced)
