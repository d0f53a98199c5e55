"""The list of methods and their properties that `fedelta methods` prints."""

from dataclasses import fields

from rich.console import Console
from rich.table import Table

from fedelta.methods import Method, Properties, aliases, methods

# Short headings, so that the table fits a terminal of 80 columns.
_COLUMNS = {
    "exact": "exact",
    "no_op_invariant": "no-op",
    "gauge_invariant": "gauge",
    "reduces_to_fedit": "≡ fedit",
    "linear": "linear",
    "identity": "identity",
}


def print_methods(console: Console) -> None:
    """Print the table of properties, then each method with its paper and options."""
    shared = {field.name: field.default for field in fields(Method)}
    table = Table(caption="where each property holds (equal: at equal ranks); docs/methods.md 5")
    for name in ("method", "ranks", *(_COLUMNS[field] for field in Properties._fields)):
        table.add_column(name, no_wrap=True)
    for name, method in methods().items():
        ranks, holds = "mixed" if method.mixed_ranks else "equal", method.properties
        words = {"never": "–", False: "–", True: "yes", "always": "yes", "equal ranks": "equal"}
        table.add_row(name, ranks, *(words[where] for where in holds))
    console.print(table)
    for name, method in methods().items():
        console.print(f"[bold]{name}[/bold]: {method.summary} ({method.paper})", highlight=False)
        own = [f"{f.name}={f.default}" for f in fields(method) if f.name not in shared]
        if own:
            about = str(method.__doc__).removeprefix("Options: ")
            console.print(f"    options: {', '.join(own)}: {about}", highlight=False)
    everywhere = ", ".join(f"{name}={default}" for name, default in shared.items())
    console.print(f"options of every method: {everywhere}", highlight=False)
    for alias, (name, paper) in aliases().items():
        console.print(f"{alias}: another name of {name} ({paper})", highlight=False)
