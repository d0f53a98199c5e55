"""Labels: the names of classes as they are written, numbers, and rows that have no label.

Data sets mark a row without a label in different ways: −1 in the integers of a `ClassLabel` column (GLUE, SNLI on the
hub), `-` where the annotators of SNLI disagreed, −1 as the score of a hidden test split. Taken as labels, such rows
would be trained as the last class, or scored as right or wrong.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedelta.errors import FedeltaError, quantity
from fedelta.learning.data.cells import column_of, counts
from fedelta.learning.data.settings import Columns, DataSettings
from fedelta.learning.data.table import Table, say, shorten

WHOLE = re.compile(r"[+-]?[0-9]{1,300}")
WHOLE_FLOAT = re.compile(r"([+-]?[0-9]{1,300})(?:\.0*)?")
DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
INFERENCE = {"entailment", "contradiction", "neutral"}
"""Classes of SNLI, which writes `-` for a pair without one."""

MAX_DECIMAL_CLASSES = 20
"""Number of different decimal numbers from which a column holds scores rather than classes."""

Labels = dict[str, list[Any]]
"""Split → label of each row; None is a label that is missing."""


def resolve_labels(
    source: str, tables: Mapping[str, Table], columns: Columns, settings: DataSettings
) -> dict[str, Table]:
    """Turn labels into class names or numbers, and leave out the rows that have none.

    Raises:
        FedeltaError: naming a row whose label is not valid or not certain, or a split without labels.
    """
    label = columns.label
    if label is None:
        return dict(tables)
    unlabeled: set[Any]
    if columns.classes is not None:
        labels: Labels = {split: _class_names(table, label) for split, table in tables.items()}
        _normalize(source, label, labels)
        unlabeled = _unlabeled_classes(labels, tables, settings)
    else:
        labels = {split: _numbers(table, label, settings) for split, table in tables.items()}
        unlabeled = _unlabeled_numbers(labels, tables, settings)
    kept: dict[str, Table] = {}
    dropped: dict[str, int] = {}
    for split, table in tables.items():
        rows = [i for i, value in enumerate(labels[split]) if value is not None and value not in unlabeled]
        dropped[split] = len(table) - len(rows)
        if not rows:
            raise FedeltaError(
                f"data source {source}: none of the {len(table)} rows of {split} has a label; "
                "name another split, such as data.splits: {test: validation, validation: null}"
            )
        kept[split] = _labeled(table, label, [labels[split][i] for i in rows], rows, columns.classes is not None)
    if any(dropped.values()):
        say(f"data: {counts(dropped)} without a label left out")
    if columns.classes is not None:
        _check_known(kept, label)
    return kept


def class_order(names: Sequence[str]) -> list[str]:
    """Class names in order: whole numbers by value, texts by alphabet.

    Example:
        >>> class_order(["10", "9", "1"]), class_order(["b", "a", "10"])
        (['1', '9', '10'], ['10', 'a', 'b'])
    """
    if all(WHOLE.fullmatch(name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _labeled(table: Table, label: str, values: list[Any], rows: list[int], classes: bool) -> Table:
    import datasets

    chosen = table if len(rows) == len(table) else table.select(rows)
    if classes and hasattr(table.rows.features[label], "names"):
        return chosen
    return chosen.with_column(label, values, datasets.Value("string" if classes else "float64"))


def _class_names(table: Table, label: str) -> list[str | None]:
    feature = table.rows.features[label]
    values = column_of(table.rows, label).to_pylist()
    if hasattr(feature, "names"):
        wrong = next((i for i, v in enumerate(values) if not -1 <= v < len(feature.names)), None)
        if wrong is not None:
            raise FedeltaError(
                f"{table.places.name(wrong)}: label {values[wrong]} of column {label!r} is not one of its "
                f"{len(feature.names)} classes"
            )
        return [None if v == -1 else feature.names[v] for v in values]
    if str(feature.dtype).startswith("float"):
        wrong = next((i for i, v in enumerate(values) if not math.isfinite(v) or v != int(v)), None)
        if wrong is not None:
            raise FedeltaError(
                f"{table.places.name(wrong)}: column {label!r} holds {feature.dtype} ({values[wrong]}), expected "
                "classes: text or whole numbers; for numbers set task: regression"
            )
        return [str(int(v)) for v in values]
    return [str(v) for v in values]


def _normalize(source: str, label: str, labels: Labels) -> None:
    """Write 1.0 as 1 if all classes are whole numbers; refuse scores, and names that differ in white space only."""
    rows = sum(map(len, labels.values()))
    names = {value for values in labels.values() for value in values if value is not None}
    if any("." in name for name in names) and all(WHOLE_FLOAT.fullmatch(name) for name in names):
        short = {name: WHOLE_FLOAT.fullmatch(name)[1] for name in names}  # type: ignore[index]
        for split, values in labels.items():
            labels[split] = [None if value is None else short[value] for value in values]
        return
    fractions = [name for name in names if not WHOLE.fullmatch(name)]
    decimal = fractions and all(DECIMAL.fullmatch(name) or COMMA.fullmatch(name) for name in names)
    if decimal and (len(names) > MAX_DECIMAL_CLASSES or 2 * len(names) > rows):
        raise FedeltaError(
            f"data source {source}: column {label!r} holds {len(names)} different numbers such as "
            f"{shorten(min(fractions), 20)!r}, expected classes; for numbers set task: regression"
        )
    _compare_spellings(source, label, names)


def _compare_spellings(source: str, label: str, names: set[str]) -> None:
    """Refuse names that differ in white space only, and tell if some differ in case only."""
    folded: dict[str, str] = {}
    stripped: dict[str, str] = {}
    for name in sorted(names):
        other = stripped.setdefault(name.strip(), name)
        if other != name:
            raise FedeltaError(
                f"data source {source}: the labels {shorten(other, 40)!r} and {shorten(name, 40)!r} of column "
                f"{label!r} differ in white space only"
            )
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            say(f"data: {shorten(other, 40)!r} and {shorten(name, 40)!r} of column {label!r} are two classes")


def _unlabeled_classes(labels: Labels, tables: Mapping[str, Table], settings: DataSettings) -> set[str]:
    """Names that mean that a row has no label.

    Raises:
        FedeltaError: if a name looks like one, but may be a class as well.
    """
    if settings.unlabeled is not None:
        return set(settings.unlabeled)
    names = {value for values in labels.values() for value in values if value is not None}
    unlabeled = set()
    for sign in ("-", "-1"):
        others = names - {sign}
        if sign not in names or not others:
            continue
        if sign == "-":
            certain = others <= INFERENCE
            doubtful = any(c.isalnum() for name in others for c in name)
        else:
            # A class must occur in the training rows. {−1, 1} is a usual way to write two classes.
            certain = all(WHOLE.fullmatch(n) for n in others) and "-1" not in labels["train"]
            doubtful = all(WHOLE.fullmatch(n) and int(n) >= 0 for n in others) and others != {"1"}
        if not certain and doubtful and settings.missing == "refuse":
            _refuse_doubtful(sign, sign, labels, tables)
        if certain or doubtful:
            unlabeled.add(sign)
    return unlabeled


def _unlabeled_numbers(labels: Labels, tables: Mapping[str, Table], settings: DataSettings) -> set[float]:
    if settings.unlabeled is not None:
        try:
            return {float(value) for value in settings.unlabeled}
        except ValueError as error:
            raise FedeltaError(
                "data.unlabeled: expected numbers, because task regression has numbers as labels"
            ) from error
    for split, values in labels.items():
        if set(values) == {-1.0}:
            raise FedeltaError(
                f"{tables[split].places.name(0)}: all {len(values)} labels of {split} are -1, which usually means that "
                "there are none; name another split with data.splits, or set data.unlabeled: []"
            )
    numbers = {value for values in labels.values() for value in values}
    if -1.0 not in numbers or min(numbers) < -1 or any(-1 < value < 0 for value in numbers):
        return set()
    if settings.missing == "refuse":
        _refuse_doubtful("-1", -1.0, labels, tables)
    return {-1.0}


def _refuse_doubtful(sign: str, value: Any, labels: Labels, tables: Mapping[str, Table]) -> None:
    split = next(split for split, values in labels.items() if value in values)
    number = sum(values.count(value) for values in labels.values())
    raise FedeltaError(
        f"{tables[split].places.name(labels[split].index(value))}: label {sign} in {quantity(number, 'row')}: no "
        f"label, or a label? data.missing: drop leaves out such rows, data.unlabeled: [] takes {sign} as a label"
    )


def _check_known(tables: Mapping[str, Table], label: str) -> None:
    """Check that each class of a split has a training row, or is one of the training rows' `ClassLabel`."""
    train = tables["train"].rows
    known = set(getattr(train.features[label], "names", None) or train.unique(label))
    for split, table in tables.items():
        feature = table.rows.features[label]
        values = table.rows[label][:]
        names = [feature.names[v] for v in values] if hasattr(feature, "names") else values
        unknown = [i for i, name in enumerate(names) if name not in known]
        if unknown:
            raise FedeltaError(
                f"{table.places.name(unknown[0])}: split {split} has the label {shorten(names[unknown[0]], 40)!r}, "
                f"which no training row has ({quantity(len(unknown), 'row')} in all); name other splits by data.splits"
            )


def _numbers(table: Table, label: str, settings: DataSettings) -> list[float]:
    """Labels as numbers. In a text file, `3,5` is a number where the column has decimal commas."""
    values = column_of(table.rows, label).to_pylist()
    if not any(isinstance(value, str) for value in values):
        wrong = next((i for i, v in enumerate(values) if isinstance(v, bool) or not math.isfinite(v)), None)
        if wrong is not None:
            raise _not_a_number(table, label, wrong, values[wrong])
        return [float(value) for value in values]
    texts = [str(value).strip() for value in values]
    decimal = settings.decimal or _decimal_sign(table, label, texts)
    numbers = []
    for i, text in enumerate(texts):
        plain = text.replace("−", "-")
        if decimal == ",":
            if "." in plain:
                raise _not_a_number(table, label, i, text)
            plain = plain.replace(",", ".")
        if not DECIMAL.fullmatch(plain) or not math.isfinite(float(plain)):
            raise _not_a_number(table, label, i, text)
        numbers.append(float(plain))
    return numbers


def _not_a_number(table: Table, label: str, row: int, value: Any) -> FedeltaError:
    return FedeltaError(
        f"{table.places.name(row)}: column {label!r} holds {shorten(repr(value), 40)}, expected numbers"
    )


def _decimal_sign(table: Table, label: str, texts: Sequence[str]) -> str:
    """The decimal sign of a column.

    Raises:
        FedeltaError: if a comma may as well separate thousands.
    """
    commas = [text for text in texts if COMMA.fullmatch(text)]
    if not commas:
        return "."
    if all(re.fullmatch(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}", text) for text in commas):
        row = texts.index(commas[0])
        raise FedeltaError(
            f"{table.places.name(row)}: {commas[0]!r} in column {label!r} may be a decimal or thousands; set "
            "data.decimal: ',' for decimals, or write numbers without separators of thousands"
        )
    say(f"data: the numbers of column {shorten(label, 40)!r} have decimal commas, such as {commas[0]}")
    return ","
