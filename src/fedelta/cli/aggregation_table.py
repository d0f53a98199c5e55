"""The output of `fedelta aggregate`: a table, or JSON."""

import json
import re
from collections import defaultdict
from dataclasses import asdict
from math import sqrt
from statistics import mean

from rich.table import Table

from fedelta.aggregate.report import Aggregation, ModuleReport
from fedelta.errors import quantity
from fedelta.lora.files.peft_write import PATCH

SAME = 1e-5
"""Relative distance of two adapters that differ by rounding only."""

MAX_ROWS = 40
"""Modules of a larger model are combined by kind: modules whose names differ only in the layer's number."""


def aggregation_json(done: Aggregation) -> str:
    """Format an aggregation as JSON, with every module."""
    return json.dumps(
        {
            "output": str(done.output),
            "method": done.method,
            "sum": done.as_sum,
            "base_model": done.base_model,
            "notes": list(done.notes),
            "clients": [{"folder": folder, "weight": p} for folder, p in done.clients],
            "base_patch": done.patch,
            "modules": [asdict(report) for report in done.modules],
            "bytes": sum(report.bytes for report in done.modules),
        },
        indent=2,
        allow_nan=False,
    )


def aggregation_table(done: Aggregation) -> Table:
    """Tabulate ranks, deviation, error of a cut and bytes, with modules combined by kind if there are many."""
    cut = any(report.cut for report in done.modules)
    kinds = _kinds(done.modules)
    deviation = any(report.deviation is not None for report in done.modules)
    caption = ""
    if deviation:
        caption = "deviation: what averaging A and B apart would miss of the exact mean, ‖ΔW − B̄Ā‖ / ‖ΔW‖"
        if len(kinds) < len(done.modules):
            caption += "; mean over the modules of a kind, --json has each"
    table = Table(caption=caption, caption_justify="left")
    optional = [*(["deviation"] if deviation else []), *(["error of the cut"] if cut else [])]
    names = ["module", "rank in", "rank out", *optional, "MB"]
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for kind, reports in kinds.items():
        table.add_row(*_cells(f"{kind} ({len(reports)})" if len(reports) > 1 else kind, reports, deviation, cut))
    if len(kinds) > 1:
        table.add_section()
        table.add_row(*_cells("all", done.modules, deviation, cut))
    return table


def aggregation_lines(done: Aggregation) -> list[str]:
    """Lines that say what was written and where."""
    exact = "exact weighted sum" if done.as_sum else "exact weighted mean"
    what = exact if done.method is None else f"one step of {done.method}"
    lines = [f"{what} of {quantity(len(done.clients), 'adapter')}"]
    if done.method is not None:
        lines.append(_distance_line(done.modules))
    if not any(report.norm or report.patch_width for report in done.modules):
        lines.append("the result is zero: it changes nothing")
    if any(report.cut for report in done.modules):
        error = _overall_cut(done.modules)
        lines.append(f"the cut costs a relative error of {error:.3g} (root mean square over modules)")
    lines.append(f"adapter   {done.output}")
    if done.patch:
        lines.append(f"patch     {done.output / PATCH}: add U·V to each base weight (out×in) before use")
    return lines


def _kinds(reports: list[ModuleReport]) -> dict[str, list[ModuleReport]]:
    kinds = defaultdict(list)
    for report in reports:
        name = (
            re.sub(r"\.\d+(?=\.|\[|$)", ".*", re.sub(r"\[\d+\]$", "[*]", report.module))
            if len(reports) > MAX_ROWS
            else report.module
        )
        kinds[name].append(report)
    return dict(kinds)


def _cells(name: str, reports: list[ModuleReport], deviation: bool, cut: bool) -> list[str]:
    rank_in = _span([r.ranks[0] for r in reports] + [r.ranks[1] for r in reports])
    rank_out = _span([r.rank for r in reports])
    if any(r.patch_width for r in reports):
        rank_out += f" + {_span([r.patch_width for r in reports])} in the base"
    cells = [name, rank_in, rank_out]
    if deviation:
        measured = [r.deviation for r in reports if r.deviation is not None]
        cells.append(f"{mean(measured):.3g}" if measured else "")
    if cut:
        cells.append(f"{_overall_cut(reports):.3g}")
    return [*cells, f"{sum(r.bytes for r in reports) / 1e6:.2f}"]


def _distance_line(reports: list[ModuleReport]) -> str:
    """Say how far the result of a method is from the exact mean, which is what an aggregation without one gives."""
    measured = [report.distance for report in reports if report.distance is not None]
    if not measured:
        return "its distance from the exact weighted mean was not measured: too many folders"
    distance = sqrt(mean(each**2 for each in measured))
    if distance < SAME:
        return f"it equals the exact weighted mean (relative distance {distance:.0e})"
    return (
        f"relative distance from the exact weighted mean of the adapters as they are: {distance:.3g}; for that mean, "
        "leave --method out"
    )


def _overall_cut(reports: list[ModuleReport]) -> float:
    return sqrt(mean(r.cut**2 for r in reports))


def _span(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)}–{max(values)}"
