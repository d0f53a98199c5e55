"""A self-contained HTML page of a run or a comparison."""

from collections.abc import Sequence
from pathlib import Path

import jinja2
import yaml

from fedelta import __version__
from fedelta.errors import printable
from fedelta.files import write_file
from fedelta.runs.report.examples import Example, pick_examples
from fedelta.runs.report.summary import caption, cells, columns, default_target, metric_of, more_metrics, summarize
from fedelta.runs.runner import Run

EXAMPLES = 5
"""Maximum number of prompts with answers."""
MAX_TEXT = 2000
"""Maximum number of characters of a prompt or an answer."""


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
        columns=columns(metric, target, more_metrics(runs)),
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
        examples=[_shown(example) for example in pick_examples(runs, EXAMPLES)],
        config=yaml.safe_dump(runs[0].config.dump(), sort_keys=False),
    )
    write_file(folder / "report.html", page)
    return folder / "report.html"


def _shown(example: Example) -> list[tuple[str, str]]:
    """Label and text of each row of an example, as a model or a file wrote them but without control characters."""
    before = [] if example.before is None else [("before", example.before)]
    rows = [("prompt", example.prompt), ("reference", example.reference), *before, *example.answers]
    return [(name, "\n".join(printable(line, MAX_TEXT) for line in text[:MAX_TEXT].split("\n"))) for name, text in rows]
