"""Tables of the traffic of a grid's experiments, and of what happened to ranks."""

import json
from collections.abc import Sequence
from statistics import mean
from typing import Any

import pandas as pd

from fedelta.federation.ranks import initial_ranks
from fedelta.learning.data.partition import client_names
from fedelta.protocol.serialization import ByteCount
from fedelta.runs.config import parse_config
from fedelta.runs.report.statistics import spread
from fedelta.runs.report.summary import MB
from fedelta.runs.report.text_table import TextTable
from fedelta.settings import quota
from fedelta.sweep.report.results import Panel, Results, shares_of_energy
from fedelta.sweep.report.scores import headings
from fedelta.sweep.results import Row, stored_settings

_PARAMETERS = ("LoRA parameters", "communicated")
_MEGABYTES = ("adapter down, MB", "adapter up, MB", "patch down, MB", "heads, MB", "all, MB")


def traffic(results: Results) -> TextTable:
    """Tabulate the parameters and measured bytes of a client in a round."""
    panels = _by_model(results)
    head = [results.experiment.rows]
    for label in _distinct_labels(results, panels):
        head += [f"{label} LoRA parameters".strip(), *_PARAMETERS[1:], *_MEGABYTES]
    lines = results.lines(lambda row, panel: _traffic_texts(results.trained_cells(row, panel)), panels)
    sizes = [
        [size for row in results.rows for c in results.trained_cells(row, panel) if (size := c["base_parameters"])]
        for panel in panels
    ]
    if any(sizes):
        line = ["full fine-tuning, computed"]
        for parameters in sizes:
            if parameters:
                one, both = (f"{size * parameters[0] / MB:,.3f}" for size in (4, 8))
                line += [f"{parameters[0]:,}", f"{2 * parameters[0]:,}", one, one, "–", "–", both]
            else:
                line += _traffic_texts([])
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
    """The first panel of each model and of each way to assign ranks.

    Data sets differ in the number of classes alone, which counts in the head.
    """
    distinct: list[tuple[list[Any], Panel]] = []
    for panel in results.panels:
        cells = [cell for row in results.rows for cell in results.trained_cells(row, panel)]
        if cells:
            config = stored_settings(cells[0])
            del config["lora"]["alpha"]  # it is chosen for the data
            differing = [config[name] for name in ("model", "lora", "ranks", "federation")]
            # A base patch grows with the number of clients that it sums over.
            differing.append(max(cell["clients"] for cell in cells))
            if all(differing != other for other, _ in distinct):
                distinct.append((differing, panel))
    return [panel for _, panel in distinct]


def _distinct_labels(results: Results, panels: list[Panel]) -> list[str]:
    """A label for each of these panels: the values in which they differ from each other."""
    values = [dict(panel.values) for panel in panels]
    axes = [axis for axis in (values[0] if values else {}) if len({by_axis[axis] for by_axis in values}) > 1]
    return [", ".join(results.label(by_axis[axis]) for axis in axes) for by_axis in values]


def _traffic_texts(cells: Sequence[Row]) -> list[str]:
    """Mean traffic of cells as text, a column each; a dash where no cell has a value."""
    means = pd.DataFrame(list(map(_traffic, cells)), columns=[*_PARAMETERS, *_MEGABYTES], dtype=float).mean()
    digits = dict.fromkeys(_PARAMETERS, 0) | dict.fromkeys(_MEGABYTES, 3)
    return ["–" if pd.isna(value) else f"{value:,.{digits[name]}f}" for name, value in means.items()]


def _traffic(row: Row) -> dict[str, float | None]:
    """Parameters and megabytes of a client in a round, mean over all clients, by heading."""
    down, up = (
        {part: _client_bytes(row, direction, part) for part in ByteCount._fields} for direction in ("down", "up")
    )
    in_fp32 = json.loads(row["config"])["federation"].get("precision", "float32") == "float32"
    return {
        "LoRA parameters": _lora_parameters(row),
        "communicated": (down["adapter"] + up["adapter"] + down["patch"]) / 4 if in_fp32 else None,
        "adapter down, MB": down["adapter"] / MB,
        "adapter up, MB": up["adapter"] / MB,
        "patch down, MB": down["patch"] / MB,
        "heads, MB": (down["heads"] + up["heads"]) / MB,
        "all, MB": sum([*down.values(), *up.values()]) / MB,
    }


def _client_bytes(row: Row, direction: str, part: str) -> float:
    """Bytes of a part of the messages in one direction, mean over clients and rounds."""
    # Before the first aggregation there is no patch to send.
    rounds = row["rounds"][1:] if part == "patch" else row["rounds"]
    return sum(r[direction][part] for r in rounds) / max(1, sum(r["sampled"] for r in rounds))


def _lora_parameters(row: Row) -> float:
    """LoRA parameters of a client, mean over all clients at the end."""
    ranks = row["rounds"][-1]["ranks"]
    return sum(row["lora_parameters"][rank] * count for rank, count in ranks.items()) / sum(ranks.values())


def energy(results: Results) -> TextTable:
    """Tabulate the share of energy that remains above the lowest rank."""
    head = [results.experiment.rows]
    head += [panel.label or "share, %" for panel in results.panels]

    def texts(row: str, panel: Panel) -> list[str]:
        shares = map(_share_above_lowest, results.trained_cells(row, panel))
        return [spread([share for share in shares if share is not None], 100, 1)]

    note = (
        "Share of the adapter's energy Σ‖b_j a_j‖² in rank indices above the lowest rank of any client, last round, "
        "%; a dash where all ranks are equal, or the adapter has just been merged into the base. Where a method orders "
        "rank indices by singular values, the last ones are small by that alone."
    )
    name, title = f"{results.name}-energy", f"{results.title}: energy above the lowest rank"
    return TextTable(name, title, head, results.lines(texts), note)


def _share_above_lowest(row: Row) -> float | None:
    """Share of energy above the lowest rank in the last round; None for equal ranks or an adapter without energy."""
    ranks = [int(rank) for record in row["rounds"] for rank in record["ranks"]]
    shares = shares_of_energy(row)[-1]
    if min(ranks) == max(ranks) or not any(shares):
        return None
    # HetLoRA's clients may prune themselves below the rank that they were assigned.
    lowest = min(int(rank) for rank in row["rounds"][0]["ranks"])
    return sum(shares[lowest:])


def first_aggregation(results: Results) -> TextTable:
    """Tabulate the score of high-rank clients before and after the first aggregation."""
    head = [results.experiment.rows]
    for panel in results.panels:
        head += [f"{panel.label} {when}".strip() for when in ("before", "after", "change")]

    def texts(row: str, panel: Panel) -> list[str]:
        pairs = [pair for cell in results.trained_cells(row, panel) if (pair := _first_aggregation(cell)) is not None]
        before, after = [own for own, _ in pairs], [mean for _, mean in pairs]
        change = [b - a for a, b in pairs]
        return [spread(values, results.metric(panel).factor) for values in (before, after, change)]

    note = (
        f"Validation {headings(results)}, mean ± standard deviation over seeds: of the models of the clients with the "
        "highest rank after their first local training, and of the global model that they get back."
    )
    name, title = f"{results.name}-first-aggregation", f"{results.title}: first aggregation"
    return TextTable(name, title, head, results.lines(texts), note)


def _first_aggregation(row: Row) -> tuple[float, float] | None:
    """Score of the highest-rank clients' own models, and of the global model; None if one was not evaluated."""
    own, after = row["rounds"][0]["own"], row["rounds"][0]["validation"]
    if not own or after is None:
        return None
    high = max(client["rank"] for client in own)
    return mean(client["score"] for client in own if client["rank"] == high), after[row["metric"]]


def high_rank_clients(results: Results) -> TextTable:
    """Tabulate how many clients with the high rank hold balanced classes (partition `two-quality`)."""
    head = [results.experiment.rows]
    for panel in results.panels:
        head += [f"{panel.label} {what}".strip() for what in ("with the high rank", "of them balanced, %")]

    def texts(row: str, panel: Panel) -> list[str]:
        counts = [pair for cell in results.trained_cells(row, panel) if (pair := _high_ranks(cell)) is not None]
        return [
            spread([float(high) for high, _ in counts], digits=1),
            spread([balanced / high for high, balanced in counts if high], 100, 0),
        ]

    note = (
        "Clients that were given the high rank, and the share of them whose classes are balanced; a dash where the "
        "partition is not two-quality."
    )
    name, title = f"{results.name}-high-rank-clients", f"{results.title}: who has the high rank"
    return TextTable(name, title, head, results.lines(texts), note)


def _high_ranks(row: Row) -> tuple[int, int] | None:
    """Number of clients that were assigned the high rank, and how many of them are balanced; these come first."""
    config = parse_config(json.loads(row["config"]))
    if config.partition.kind != "two-quality":
        return None
    names = client_names(row["clients"])
    first = initial_ranks(names, config.ranks, row["seed"])
    high = {name for name in names if first[name] == config.ranks.high}
    high |= {name for record in row["rounds"] for name in record["promoted"]}
    balanced = set(names[: quota(config.partition.share, len(names))])
    return len(high), len(high & balanced)
