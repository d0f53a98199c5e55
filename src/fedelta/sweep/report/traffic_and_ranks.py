"""Tables of what a grid's experiments cost, and of what became of ranks."""

import json
from collections.abc import Callable
from statistics import mean
from typing import Any

from fedelta.federation.ranks import initial_ranks
from fedelta.learning.shards import client_names
from fedelta.protocol.serialization import ByteCount
from fedelta.runs.config import parse_config
from fedelta.runs.report.statistics import spread
from fedelta.runs.report.summary import MB
from fedelta.runs.report.text_table import TextTable
from fedelta.settings import quota
from fedelta.sweep.report.results import Panel, Results, shares_of_energy
from fedelta.sweep.report.scores import headings
from fedelta.sweep.results import Row, agree


def traffic(results: Results) -> TextTable:
    """Parameters and measured bytes of a client in a round."""
    panels = _by_model(results)
    head = [results.experiment.rows]
    for label in _told_apart(results, panels):
        head += [f"{label} LoRA parameters".strip(), *_PARTS]
    lines = []
    for row in results.rows:
        line = [results.label(row)]
        for panel in panels:
            cells = list(results.trained(row, panel).values())
            line += [_averaged(cells, measure) for measure in _TRAFFIC] if cells else ["–"] * len(_TRAFFIC)
        lines.append(line)
    whole = [
        [n for row in results.rows for c in results.trained(row, panel).values() if (n := c["base_parameters"])]
        for panel in panels
    ]
    if any(whole):
        line = ["full fine-tuning, computed"]
        for found in whole:
            if found:
                one, both = (f"{size * found[0] / MB:,.3f}" for size in (4, 8))
                line += [f"{found[0]:,}", f"{2 * found[0]:,}", one, one, "–", "–", both]
            else:
                line += ["–"] * len(_TRAFFIC)
        lines.append(line)
    note = (
        "A client in a round, mean over those that were sent something: LoRA parameters that it has at the ranks of "
        "the last round; parameters that are communicated, of adapter and base patch both ways (a dash where messages "
        "are not of fp32); and 10⁶ bytes as serialized: adapter (A and B, or the one of them that is sent), base patch "
        "(from the second round on: in the first there is none), and modules trained whole (heads), both ways. All: "
        "these with overhead. Full fine-tuning: all parameters in fp32."
    )
    return TextTable(f"{results.name}-traffic", f"{results.title}: parameters and bytes a client", head, lines, note)


def _by_model(results: Results) -> list[Panel]:
    """The first panel of each model and of each way in which ranks are given out: of data only the number of classes
    counts, in the head."""
    found: list[tuple[list[Any], Panel]] = []
    for panel in results.panels:
        cells = [cell for row in results.rows for cell in results.trained(row, panel).values()]
        if cells:
            config = json.loads(cells[0]["config"])
            del config["lora"]["alpha"]  # which is chosen for the data
            differing = [config[name] for name in ("model", "lora", "ranks", "federation")]
            # A patch grows with the clients that it is of.
            differing.append(max(cell["clients"] for cell in cells))
            if not any(agree(differing, other) for other, _ in found):
                found.append((differing, panel))
    return [panel for _, panel in found]


def _told_apart(results: Results, panels: list[Panel]) -> list[str]:
    """A label for each of these columns: the values in which they differ from each other."""
    values = [dict(panel.values) for panel in panels]
    axes = [axis for axis in (values[0] if values else {}) if len({of[axis] for of in values}) > 1]
    return [", ".join(results.label(of[axis]) for axis in axes) for of in values]


def lora_parameters(row: Row) -> float:
    """Of a client, mean over all clients at the end."""
    ranks = row["rounds"][-1]["ranks"]
    return sum(row["lora_parameters"][rank] * count for rank, count in ranks.items()) / sum(ranks.values())


def _bytes(direction: str, part: str) -> Callable[[Row], float]:
    def measure(row: Row) -> float:
        # Before the first aggregation there is no patch to send.
        rounds = row["rounds"][1:] if part == "patch" else row["rounds"]
        return sum(r[direction][part] for r in rounds) / max(1, sum(r["sampled"] for r in rounds))

    return measure


def _all_bytes(row: Row) -> float:
    return sum(_bytes(direction, part)(row) for direction in ("down", "up") for part in ByteCount._fields)


def _communicated(row: Row) -> float | None:
    if json.loads(row["config"])["federation"].get("precision", "float32") != "float32":
        return None
    parts = (("down", "adapter"), ("up", "adapter"), ("down", "patch"))
    return sum(_bytes(direction, part)(row) for direction, part in parts) / 4


_TRAFFIC: list[tuple[Callable[[Row], float | None], float, int]] = [
    (lora_parameters, 1, 0),
    (_communicated, 1, 0),
    (_bytes("down", "adapter"), MB, 3),
    (_bytes("up", "adapter"), MB, 3),
    (_bytes("down", "patch"), MB, 3),
    (lambda row: _bytes("down", "heads")(row) + _bytes("up", "heads")(row), MB, 3),
    (_all_bytes, MB, 3),
]
_PARTS = ("communicated", "adapter down, MB", "adapter up, MB", "patch down, MB", "heads, MB", "all, MB")


def _averaged(cells: list[Row], measure: tuple[Callable[[Row], float | None], float, int]) -> str:
    function, unit, digits = measure
    found = [value for cell in cells if (value := function(cell)) is not None]
    return f"{mean(found) / unit:,.{digits}f}" if found else "–"


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
        "%; a dash where all ranks are equal, or the adapter has just been merged into the base. Where a method orders "
        "rank indices by singular values, the last ones are small by that alone."
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
        f"Validation {headings(results)}, mean ± standard deviation over seeds: of the models of the clients with the "
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
