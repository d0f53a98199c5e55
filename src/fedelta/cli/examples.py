"""Examples of generated answers on the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedelta.cli.printing import print_text
from fedelta.errors import one_line
from fedelta.learning.data.table import shorten
from fedelta.runs.report.examples import pick_examples

MAX_METHODS = 3


def print_examples(console: Console, runs: Sequence[Any]) -> None:
    """Print some prompts of the test split with the reference, the answer before training, and those after it.

    Args:
        console: where to print; at most 26 lines.
        runs: finished runs. Nothing is printed if they have generated no text.
    """
    methods = len({run.config.method.name for run in runs})
    examples = pick_examples(runs, 3 if methods == 1 else 2, MAX_METHODS)
    if not examples:
        return
    best = f" of the {MAX_METHODS} best methods" if methods > MAX_METHODS else ""
    print_text(console, f"answers{best} to some prompts of the test split; generations.jsonl has all of them")
    names = ["reference", *(name for name, _ in examples[0].answers)]
    labels = min(max(map(len, names)), 24)
    width = max(console.width - labels - 2, 20)
    for example in examples:
        before = [] if example.before is None else [("before", example.before)]
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=labels, no_wrap=True, overflow="ellipsis", style="dim")
        table.add_column()
        # A prompt takes one line, and each other text at most two.
        table.add_row("prompt", Text(shorten(one_line(example.prompt, 10_000), width), style="bold"))
        for name, text in [("reference", example.reference), *before, *example.answers]:
            table.add_row(Text(one_line(name, 60)), Text(shorten(one_line(text, 10_000), 2 * width - 20) or "(empty)"))
        console.print(table, highlight=False)
        if example is not examples[-1]:
            console.print()
