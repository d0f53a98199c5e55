"""The command `fedelta predict`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedelta.cli.printing import print_path, print_text
from fedelta.cli.results import Base, Client, Device, DeviceName, Dtype, Place, dtype_name, say_loading
from fedelta.cli.terminal import err, out
from fedelta.errors import listed, printable, quantity

MAX_ROWS, MAX_TEXT = 20, 80
"""Maximum numbers of rows, and of characters of a text, on the terminal."""
PREDICTION = "prediction"

if TYPE_CHECKING:
    from fedelta.runs.predict import Predictions


def predict(
    result: Place,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Rows: CSV, TSV, JSON, JSONL, Parquet or Excel.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write: .csv, .tsv, .jsonl or .parquet. Default: print a table."),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Column of the text; twice for pairs. Default: those of the run.")
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write the probability of each class.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    batch_size: Annotated[int, typer.Option(help="Number of texts per batch.", min=1)] = 64,
    client: Client = None,
    base: Base = None,
    device: Device = DeviceName.auto,
    dtype: Dtype = None,
) -> None:
    """Predict the labels of new rows with the classifier or regression of a run, or with an adapter."""
    from fedelta.runs.output_table import check_output, write_rows

    if output is not None:
        check_output(output, overwrite)

    from fedelta.cli.bars import progress_bar
    from fedelta.runs.predict import check_texts, predict_table, read_rows, text_columns
    from fedelta.runs.result_model import check_result, load_result

    # What can be checked without the model is checked before it is loaded, which may take minutes.
    found = check_result(result, "predict", client)
    columns = text_columns(found, text)
    table = read_rows(file, found.data, columns)
    check_texts(str(file), table, columns)
    say_loading(base or found.base)
    loaded = load_result(result, "predict", client=client, base=base, device=device, dtype=dtype_name(dtype))
    with progress_bar(err, "texts") as progress:
        predictions = predict_table(loaded, table, columns, probabilities, batch_size, progress)
    if output is None:
        _print_rows(predictions.table, columns)
    else:
        write_rows(output, predictions.table)
        print_path(out, "predicted", f"{output}: {quantity(predictions.table.num_rows, 'row')}")
    if predictions.scores:
        from fedelta.learning.tasks.metrics import METRICS

        shown = [f"{METRICS[name].title} {METRICS[name].format(score)}" for name, score in predictions.scores.items()]
        print_text(out, f"scores    {', '.join(shown)}{_notes(predictions, bool(loaded.classes))}")
    elif predictions.unknown or predictions.empty:
        print_text(err, f"no score: no label in column {loaded.data.label!r} is one that the model knows", "note:")


def _print_rows(table: Any, columns: Sequence[str]) -> None:
    """Print the texts of the first rows with their predictions."""
    from rich.table import Table
    from rich.text import Text

    names = [*columns, *table.column_names[table.column_names.index(PREDICTION) :]]
    shown = Table()
    for name in names:
        shown.add_column(Text(printable(name, 60)), justify="left" if name in columns else "right")
    for row in table.slice(0, MAX_ROWS).select(names).to_pylist():
        cells = [f"{value:.6g}" if isinstance(value, float) else str(value) for value in row.values()]
        shown.add_row(*(Text(printable(cell, MAX_TEXT)) for cell in cells))
    out.print(shown)
    if table.num_rows > MAX_ROWS:
        print_text(out, f"{quantity(table.num_rows - MAX_ROWS, 'more row')}; -o FILE writes all of them")


def _notes(predictions: "Predictions", classes: bool) -> str:
    """What the scores have not counted, or counted as wrong."""
    notes = []
    if predictions.empty:
        notes.append(
            f"without {quantity(predictions.empty, 'row')} that {'has' if predictions.empty == 1 else 'have'} no label"
        )
    if predictions.unknown:
        labels = listed(predictions.unknown)
        notes.append(
            f"not known to the model, so always wrong: {labels}"
            if classes
            else f"without labels that are no numbers: {labels}"
        )
    return f" ({'; '.join(notes)})" if notes else ""
