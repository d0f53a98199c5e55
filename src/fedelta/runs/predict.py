"""Predictions of a classifier or a regression for new rows."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

if TYPE_CHECKING:
    import pandas

from fedelta.errors import FedeltaError, listed, quantity
from fedelta.learning.data import DataSettings
from fedelta.learning.data.cells import empty_cells
from fedelta.learning.data.examples import Examples, tokenize
from fedelta.learning.data.files import read_file
from fedelta.learning.data.in_memory import memory_table
from fedelta.learning.data.streams import format_of
from fedelta.learning.data.table import Table, shorten
from fedelta.learning.device import device_errors
from fedelta.learning.model.padding import longest_text
from fedelta.runs.finished import Run
from fedelta.runs.result_model import ResultFolder, ResultModel, check_result, load_result

PREDICTION, PROBABILITY, PREFIX = "prediction", "probability", "probability_"
TABLES = ("csv", "tsv")
BATCH = 64
_WHOLE = re.compile(r"^([+-]?\d+)\.0*$")
"""A whole number that is written as a decimal one: 1.0 and 1 are one class."""
Progress = Callable[[int, int], None]


class Predictions(NamedTuple):
    """Predictions for the rows of a table.

    Args:
        table: the rows with the columns of the predictions.
        scores: score → value, if the rows have labels.
        empty: number of rows without a label; they do not count in `scores`.
        unknown: labels that the model does not know. Its predictions for their rows count as wrong.
    """

    table: pa.Table
    scores: dict[str, float]
    empty: int
    unknown: list[str]


def read_rows(file: Path, data: DataSettings, columns: Sequence[str]) -> Table:
    """Read a file as data are read.

    Args:
        file: a file of any format that data may have.
        data: settings of the run's data, which may name delimiter, encoding and the like.
        columns: columns of the text.

    Raises:
        FedeltaError: naming the file, and the row where possible.
    """
    if not file.is_file():
        raise FedeltaError(f"{file}: no such file")
    if format_of(file) not in TABLES:
        data = data.model_copy(update={"columns": None, "delimiter": None, "quoting": None})
    return read_file(file, data, columns)


def check_texts(source: str, table: Table, columns: Sequence[str]) -> None:
    """Raise unless each row has a text in each of these columns, and no column has the name of a prediction.

    Raises:
        FedeltaError: naming the column, or the first row without a text.
    """
    found = table.rows.column_names
    for column in columns:
        if column not in found:
            raise FedeltaError(
                f"{source}: no column {shorten(column, 40)!r}, found {listed(found)}; set it with --text"
            )
        if column in table.mixed:
            raise FedeltaError(f"{source}: column {shorten(column, 40)!r} mixes types: {table.mixed[column]}")
        kind = str(getattr(table.rows.features[column], "dtype", "lists or objects"))
        if kind not in ("string", "large_string", "null"):
            raise FedeltaError(f"{source}: column {shorten(column, 40)!r} holds {kind}, expected text")
        empty = np.flatnonzero(empty_cells(table.rows, column))
        if len(empty):
            more = f" (and {quantity(len(empty) - 1, 'more row')})" if len(empty) > 1 else ""
            raise FedeltaError(f"{table.places.name(empty[0])}: no text in column {shorten(column, 40)!r}{more}")
    taken = [name for name in found if name in (PREDICTION, PROBABILITY) or name.startswith(PREFIX)]
    if taken:
        raise FedeltaError(f"{source}: it has a column {shorten(taken[0], 40)!r} already; rename or remove it")


def predict_table(
    result: ResultModel,
    table: Table,
    columns: Sequence[str],
    probabilities: bool = False,
    batch_size: int = BATCH,
    progress: Progress | None = None,
) -> Predictions:
    """Predict the label of each row.

    Args:
        result: a loaded classifier or regression.
        table: rows that `check_texts` has accepted.
        columns: columns of the text.
        probabilities: add the probability of each class.
        batch_size: number of texts per batch.
        progress: receives the numbers of finished texts and of all texts, if given.
    """
    outputs = _outputs(result, table, columns, batch_size, progress)
    rows = table.rows.with_format("arrow")[:]
    if not result.classes:
        numbers = outputs[:, 0]
        rows = rows.append_column(PREDICTION, pa.array(numbers.tolist(), pa.float64()))
        return Predictions(rows, *_scores(result, table, numbers))
    shares = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    # The model computes no more digits than these.
    shares = np.array([float(f"{share:.6g}") for share in shares.flat]).reshape(shares.shape)
    best = outputs.argmax(axis=1)
    rows = rows.append_column(PREDICTION, pa.array([result.classes[i] for i in best], pa.string()))
    rows = rows.append_column(PROBABILITY, pa.array(shares.max(axis=1), pa.float64()))
    if probabilities:
        for i, name in enumerate(result.classes):
            rows = rows.append_column(f"{PREFIX}{name}", pa.array(shares[:, i], pa.float64()))
    return Predictions(rows, *_scores(result, table, best))


@torch.no_grad()
def _outputs(
    result: ResultModel, table: Table, columns: Sequence[str], batch_size: int, progress: Progress | None
) -> np.ndarray:
    """Logits of each row, in float64: (rows, outputs)."""
    model, tokenizer = result.model, result.tokenizer
    length = min(result.data.max_length, longest_text(model, tokenizer))
    examples = Examples(tokenize(table.rows, columns, tokenizer, length), [0] * len(table))
    outputs: np.ndarray | None = None
    done = 0
    for rows in examples.evaluation_order(batch_size):
        batch = examples.batch(rows, tokenizer, model.device)
        with device_errors("rows are predicted", [f"lower --batch-size (now {batch_size})"]):
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        found = logits.double().cpu().numpy()
        outputs = np.zeros((len(table), found.shape[1])) if outputs is None else outputs
        outputs[rows] = found
        done += len(rows)
        if progress is not None:
            progress(done, len(table))
    assert outputs is not None
    bad = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
    if len(bad):
        raise FedeltaError(f"{table.places.name(bad[0])}: the model computes NaN or infinity for this text")
    return outputs


def _scores(result: ResultModel, table: Table, predicted: np.ndarray) -> tuple[dict[str, float], int, list[str]]:
    """Scores of the predictions, the number of rows without a label, and the labels that are not known.

    There are no scores without labels, or if none of them is known.
    """
    label, task = result.data.label, result.task
    if task is None or label not in table.rows.column_names or label in table.mixed:
        return {}, 0, []
    names = getattr(table.rows.features[label], "names", None)
    empty, values = empty_cells(table.rows, label), table.rows[label][:]
    rows = [i for i in range(len(values)) if not empty[i]]
    written = {i: _class_name(values[i], names) for i in rows}
    known: dict[int, Any]
    if result.classes:
        index = {name: i for i, name in enumerate(result.classes)}
        known = {i: index.get(name, index.get(_WHOLE.sub(r"\1", name))) for i, name in written.items()}
    else:
        known = {i: _number(values[i], result.data.decimal) for i in rows}
    unknown = list(dict.fromkeys(written[i] for i in rows if known[i] is None))
    if len(known) == sum(value is None for value in known.values()):
        return {}, len(values) - len(rows), unknown
    if result.classes:
        # No prediction can equal these.
        known = {i: len(result.classes) + unknown.index(written[i]) if v is None else v for i, v in known.items()}
    rows = [i for i in rows if known[i] is not None]
    scores = task.own_scores([known[i] for i in rows], [predicted[i] for i in rows])
    return scores, len(values) - int((~empty).sum()), unknown


def _class_name(value: Any, names: Sequence[str] | None) -> str:
    """The name of a class as it is written in the data."""
    if names is not None and isinstance(value, int) and 0 <= value < len(names):
        return str(names[value])
    return str(value).strip()


def _number(value: Any, decimal: str | None) -> float | None:
    text = str(value).strip()
    try:
        number = float(text.replace(",", ".") if decimal == "," else text)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def predict(
    result: Run | str | Path,
    rows: Any,
    *,
    text: str | Sequence[str] | None = None,
    probabilities: bool = False,
    batch_size: int = BATCH,
    client: str | None = None,
    base: str | Path | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> "pandas.DataFrame":
    """Predict the labels of new rows with a classifier or a regression.

    Args:
        result: a run, its folder, or an adapter folder.
        rows: a file, a DataFrame, a `datasets.Dataset`, a list of mappings, or a list of texts.
        text: column of the text, or two columns for pairs. None takes those of the run.
        probabilities: add the probability of each class.
        batch_size: number of texts per batch.
        client: client whose adapter predicts, if the method has no global model.
        base: folder or name of the base model, if it is not where the result says.
        device: `auto`, `cpu` or `cuda`.
        dtype: `float32` or `bfloat16`; None takes that of the run.

    Returns:
        The rows in their order with the column `prediction` and, from a classifier, `probability`.

    Raises:
        FedeltaError: if the result is a language model, its base is missing, or a row has no text.

    Example:
        >>> fedelta.predict("runs/my", ["my parcel is late"])  # doctest: +SKIP
    """
    place = result.folder.path if isinstance(result, Run) else result
    own_base = None if base is None else str(base)
    found = check_result(place, "predict", client)
    columns = text_columns(found, text)
    # What can be checked without the model is checked before it is loaded, which may take minutes.
    if isinstance(rows, str | Path):
        if not Path(rows).is_file():
            raise FedeltaError(f"{rows}: no such file; texts are passed as a list")
        source, table = str(rows), read_rows(Path(rows), found.data, columns)
    else:
        if isinstance(rows, Sequence) and not rows:
            raise FedeltaError("rows is empty, expected at least one row or text")
        if isinstance(rows, Sequence) and all(isinstance(row, str) for row in rows):
            if len(columns) != 1:
                raise FedeltaError(f"the model reads pairs of texts: pass rows with the columns {listed(columns)}")
            rows = [{columns[0]: row} for row in rows]
        source, table = "rows", memory_table("rows", rows)
    check_texts(source, table, columns)
    loaded = load_result(place, "predict", client=client, base=own_base, device=device, dtype=dtype)
    return predict_table(loaded, table, columns, probabilities, batch_size).table.to_pandas()


def text_columns(result: ResultFolder, chosen: str | Sequence[str] | None) -> tuple[str, ...]:
    """Columns of the text: the chosen ones, or those of the run.

    Raises:
        FedeltaError: if their number is not the one that the model reads.
    """
    own = result.data.text_columns
    if not chosen:
        return own
    columns = (chosen,) if isinstance(chosen, str) else tuple(chosen)
    if result.task is not None and len(columns) != len(own):
        reads = "one text" if len(own) == 1 else "pairs of texts"
        raise FedeltaError(f"--text: the model reads {reads}, found {quantity(len(columns), 'column')}")
    return columns
