"""A self-contained HTML page of a run or a comparison."""

from collections.abc import Sequence
from pathlib import Path

import jinja2
import yaml

from fedelta import __version__
from fedelta.files import write_file
from fedelta.runs.report.summary import caption, cells, columns, default_target, metric_of, summarize
from fedelta.runs.runner import Run


def write_page(runs: Sequence[Run], folder: Path) -> Path:
    """Write `report.html` with the plot, the tables and the configuration, next to the plot, and return its path."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedelta", "runs/report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    target, metric = default_target(runs), metric_of(runs)
    svg = (folder / "score.svg").read_text()
    page = environment.get_template("page.html").render(
        title=folder.name,
        version=__version__,
        caption=caption(runs),
        columns=columns(metric, target),
        rows=[cells(metric, row) for row in summarize(runs, target)],
        metric=metric,
        plot=svg[svg.index("<svg") :],
        runs=[
            {
                "name": f"{run.config.method.name}, seed {run.config.seed}",
                "folder": str(run.folder.path),
                "records": run.records,
                "result": run.result,
            }
            for run in runs
        ],
        config=yaml.safe_dump(runs[0].config.dump(), sort_keys=False),
    )
    write_file(folder / "report.html", page)
    return folder / "report.html"
