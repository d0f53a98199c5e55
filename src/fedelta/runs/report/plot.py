"""Validation scores by round, as SVG and PNG."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from fedelta.errors import quantity
from fedelta.files import write_file
from fedelta.runs.report.statistics import deviation
from fedelta.runs.runner import Run


def curves(runs: Sequence[Run]) -> dict[str, list[tuple[int, float, float]]]:
    """Method → (finished rounds, mean score, standard deviation over seeds) of each evaluated round."""
    result = {}
    for method in dict.fromkeys(run.config.method.name for run in runs):
        by_round: dict[int, list[float]] = {}
        for run in runs:
            if run.config.method.name == method:
                for record in run.records:
                    if record["validation"]:
                        by_round.setdefault(record["round"] + 1, []).append(
                            record["validation"][run.config.task.metric]
                        )
        result[method] = [(r, mean(values), deviation(values)) for r, values in sorted(by_round.items())]
    return result


def plot_scores(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write `score.svg` and `score.png` into the folder and return their paths."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    by_method = curves(runs)
    if all(len(points) == 1 for points in by_method.values()):
        draw_scores(axes, {method: points[0][1:] for method, points in by_method.items()})
    else:
        for method, points in by_method.items():
            draw_curve(axes, points, label=method)
    if (constant_score := runs[0].result["constant_score"]) is not None:
        axes.axhline(constant_score, color="grey", linewidth=1, linestyle=":", label="most frequent class")
    axes.set(
        ylabel=f"validation {runs[0].config.task.judged.title}",
        title=f"{runs[0].config.data.title}, {quantity(len(runs), 'run')}",
    )
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return save(figure, folder, "score")


def pyplot() -> Any:
    """Import matplotlib.pyplot for drawing to files: text stays text, and equal runs draw equal files."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fedelta"})
    from matplotlib import pyplot

    return pyplot


def draw_curve(axes: Any, points: Sequence[tuple[int, float, float]], **style: Any) -> None:
    """Draw a line over rounds with a band around it.

    Args:
        axes: the axes to draw on.
        points: (finished rounds, mean, standard deviation).
        style: options of `axes.plot`.
    """
    from matplotlib.ticker import MaxNLocator

    rounds, means, spreads = zip(*points, strict=True)
    line = axes.plot(rounds, means, **{"marker": "o", "markersize": 3, **style})[0]
    low = [m - s for m, s in zip(means, spreads, strict=True)]
    high = [m + s for m, s in zip(means, spreads, strict=True)]
    axes.fill_between(rounds, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)


def draw_scores(axes: Any, scores: Mapping[str, tuple[float, float]]) -> None:
    """Draw one score for each method, where a curve over rounds would be a single point.

    Args:
        axes: the axes to draw on.
        scores: method → (mean, standard deviation).
    """
    for place, (mean_score, spread) in enumerate(scores.values()):
        axes.errorbar(place, mean_score, yerr=spread or None, marker="o", capsize=4)
    axes.set_xticks(range(len(scores)), list(scores))
    axes.set_xlim(-0.5, len(scores) - 0.5)
    axes.grid(alpha=0.25, axis="y")


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write `NAME.svg` and `NAME.png`, close the figure, and return the paths."""
    paths = []
    for suffix in ("svg", "png"):
        buffer = io.BytesIO()
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(buffer, format=suffix, dpi=150, metadata=metadata)
        paths.append(folder / f"{name}.{suffix}")
        write_file(paths[-1], buffer.getvalue())
    pyplot().close(figure)
    return paths
