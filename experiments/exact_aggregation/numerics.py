"""Measure the accuracy of the residual: two formulas, three data types, and two ways to store the sum.

    python experiments/exact_aggregation/numerics.py

The script writes tables and figures to `results/numerics`. It trains nothing and takes seconds on a CPU.
"""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.contribution import Contribution
from fedelta.lora.rank_moments import RankMoments
from fedelta.runs.report.plot import draw_curve, pyplot, save
from fedelta.runs.report.statistics import deviation
from fedelta.runs.report.text_table import TextTable

OUTPUT = Path(__file__).parent / "results" / "numerics"
SIZE, RANK, CLIENTS = 256, 4, 10
SPREADS = [10.0**-k for k in range(7)]
TYPES = (torch.float64, torch.float32, torch.bfloat16)
COLORS = {"float64": "C0", "float32": "C1", "bfloat16": "C2"}
SEEDS = range(5)
ROUNDS = 50
STEPS = (1e-2, 1e-3, 1e-4)
"""Sizes of the residual of a round, as ‖residual‖ / ‖W‖."""

Pairs = list[tuple[Tensor, Tensor]]


def clients(spread: float, dtype: torch.dtype, seed: int) -> Pairs:
    """Draw (B, A) of each client around a common adapter, with this spread, and round them to a type."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    B, A = normal(SIZE, RANK), normal(RANK, SIZE)
    return [
        ((B + spread * normal(SIZE, RANK)).to(dtype), (A + spread * normal(RANK, SIZE)).to(dtype))
        for _ in range(CLIENTS)
    ]


def covariance_form(pairs: Pairs) -> Tensor:
    """Compute mean (B_i − B̄)(A_i − Ā) in the type of the factors."""
    B, A = (torch.stack([pair[i] for pair in pairs]) for i in (0, 1))
    return ((B - B.mean(0)) @ (A - A.mean(0))).mean(0)


def published_form(pairs: Pairs) -> Tensor:
    """Compute mean B_i A_i − B̄ Ā in the type of the factors."""
    B, A = (torch.stack([pair[i] for pair in pairs]) for i in (0, 1))
    return (B @ A).mean(0) - B.mean(0) @ A.mean(0)


def streamed_form(pairs: Pairs) -> Tensor:
    """Compute the residual as fedelta does: in fp32, one client at a time, relative to the broadcast adapter."""
    begin = Adapter({"w": LoraPair(pairs[0][1].float(), pairs[0][0].float())})
    sent = [
        Contribution(f"client-{i}", 1.0, Adapter({"w": LoraPair(A.float(), B.float())}))
        for i, (B, A) in enumerate(pairs)
    ]
    residual = RankMoments(begin, sent, "total").covariance("w")
    dense = torch.zeros(SIZE, SIZE)
    residual.add_to(dense)
    return dense


def error(form: Callable[[Pairs], Tensor], spread: float, dtype: torch.dtype, seed: int) -> float:
    """Return the relative error against the covariance form of the same rounded factors in float64."""
    pairs = clients(spread, dtype, seed)
    truth = covariance_form([(B.double(), A.double()) for B, A in pairs])
    # If all clients round to the same factors, there is no residual, and any result is noise.
    return float((form(pairs).double() - truth).norm() / truth.norm()) if truth.norm() > 0 else math.nan


def _shown(values: list[float]) -> str:
    return "–" if any(map(math.isnan, values)) else f"{mean(values):.1e}"


def residuals() -> tuple[TextTable, list[Path]]:
    """Make the table and figure of the error by spread, formula and type."""
    forms = {"mean of products − product of means": published_form, "covariance": covariance_form}
    curves = {
        f"{name}, {str(dtype).removeprefix('torch.')}": [[error(f, s, dtype, seed) for seed in SEEDS] for s in SPREADS]
        for name, f in forms.items()
        for dtype in TYPES
        if not (f is covariance_form and dtype == torch.float64)
    }
    curves["fedelta, fp32 arithmetic on float32"] = [
        [error(streamed_form, s, torch.float32, seed) for seed in SEEDS] for s in SPREADS
    ]
    curves["fedelta, fp32 arithmetic on bfloat16"] = [
        [error(streamed_form, s, torch.bfloat16, seed) for seed in SEEDS] for s in SPREADS
    ]
    figure, axes = pyplot().subplots(figsize=(7, 4.4), layout="constrained")
    for name, by_spread in curves.items():
        style = {"marker": "o", "markersize": 3, "label": name, "linestyle": "--" if name.startswith("mean") else "-"}
        style["color"] = COLORS[name.rpartition(" ")[2]] if not name.startswith("fedelta") else "k"
        if name == "fedelta, fp32 arithmetic on bfloat16":
            style |= {"linestyle": ":", "marker": "s"}
        axes.plot(SPREADS, [mean(values) for values in by_spread], **style)
    axes.axhspan(1, 1e12, color="grey", alpha=0.2)
    axes.text(0.4, 2, "noise", fontsize=9)
    axes.set(xscale="log", yscale="log", ylim=(1e-17, 1e9), xlabel="spread of clients / size of their mean")
    axes.set(ylabel="relative error of the residual", title="The residual as clients come to agree")
    axes.invert_xaxis()
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)
    head = ["form", *[f"{s:.0e}" for s in SPREADS]]
    lines = [[name, *[_shown(values) for values in by_spread]] for name, by_spread in curves.items()]
    note = (
        f"‖found − true‖/‖true‖ of the residual of {CLIENTS} clients, {SIZE}×{SIZE}, rank {RANK}, mean over "
        f"{len(SEEDS)} seeds, by spread of the clients' factors over their mean. 1 and more is noise: bf16 holds no "
        "difference below 1/256 of a number: with clients closer than that hardly a residual is left; a "
        "dash is none. The covariance form in float64 is what is compared with."
    )
    table = TextTable("residual", "The residual in two forms and three types", head, lines, note)
    return table, save(figure, OUTPUT / "figures", "residual")


def folded(step: float, seed: int) -> dict[str, list[float]]:
    """Return ‖change of the weight − Σ residuals‖ / ‖Σ residuals‖ after each round, for each way to store the change.

    Args:
        step: size of the residual of a round, as ‖residual‖ / ‖W‖.
        seed: seed of the weight and the residuals.
    """
    draw = torch.Generator().manual_seed(seed)
    W = 0.02 * torch.randn(SIZE, SIZE, generator=draw)
    base = W.bfloat16()
    into_bf16, patch = base.clone(), torch.zeros(SIZE, SIZE)
    truth = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    errors: dict[str, list[float]] = {
        "folded into bf16": [],
        "fp32 patch beside bf16": [],
        "the same, as multiplied": [],
    }
    for _ in range(ROUNDS):
        U = torch.randn(SIZE, (CLIENTS - 1) * RANK, generator=draw)
        residual = U @ torch.randn((CLIENTS - 1) * RANK, SIZE, generator=draw)
        residual *= step * float(W.norm() / residual.norm())
        truth += residual.double()
        into_bf16 = (into_bf16 + residual).bfloat16()
        patch += residual
        size = float(truth.norm())
        changes = (into_bf16.double() - base.double(), patch.double(), patch.bfloat16().double())
        for name, change in zip(errors, changes, strict=True):
            errors[name].append(float((change - truth).norm()) / size)
    return errors


def folding() -> tuple[TextTable, list[Path]]:
    """Make the table and figure of the error by round, for a base in bf16."""
    figure, grid = pyplot().subplots(1, len(STEPS), figsize=(3.6 * len(STEPS), 3.4), layout="constrained", sharey=True)
    lines: dict[str, list[str]] = {}
    for axes, step in zip(grid, STEPS, strict=True):
        seeds = [folded(step, seed) for seed in SEEDS]
        for name in seeds[0]:
            values = [[seed[name][r] for seed in seeds] for r in range(ROUNDS)]
            # The first residual is stored exactly, and a logarithmic scale cannot show an error of 0.
            points = [(r + 1, mean(v), deviation(v)) for r, v in enumerate(values) if mean(v) > 0]
            draw_curve(axes, points, label=name)
            lines.setdefault(name, [name]).append(_shown(values[-1]))
        axes.set(yscale="log", title=f"residuals of {step:g} ‖W‖", ylim=(1e-8, 3))
    grid[0].set_ylabel("relative error of the sum of residuals")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    head = ["the base", *[f"residuals of {step:g} ‖W‖" for step in STEPS]]
    note = (
        f"Relative error of what {ROUNDS} rounds of residuals add to a {SIZE}×{SIZE} weight, mean over "
        f"{len(SEEDS)} seeds. As multiplied: the patch is kept in fp32 and rounded to bf16 for a forward pass."
    )
    return TextTable(
        "folding", f"{ROUNDS} rounds of residuals and a bf16 base", head, list(lines.values()), note
    ), save(figure, OUTPUT / "figures", "folding")


def main() -> None:
    torch.set_num_threads(1)
    (OUTPUT / "figures").mkdir(parents=True, exist_ok=True)
    for table, figures in (residuals(), folding()):
        table.write(OUTPUT / "tables")
        print(table.title, table.markdown(), table.note, *figures, sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()
