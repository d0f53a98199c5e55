"""Settings of the data of a run, and what a task reads from them."""

import codecs
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from fedelta.settings import Settings

BUILT_IN = "pydoc"
BUILT_IN_FUNCTIONS = "pydoc-functions"
SplitName = Literal["train", "validation", "test"]
Use = Literal["text", "cell", "messages", "class", "number"]
"""Use of a column: a text, a cell that a template shows (anything but lists and objects), messages of a conversation
(lists of objects, or texts, which may be JSON), a class, or a number."""


@dataclass(frozen=True)
class Columns:
    """Columns that a task reads.

    Args:
        uses: column → its use.
        required: groups of columns. A row is complete if at least one cell of each group is not empty.
        choose: if the columns depend on those that a source has, a function that finds them by the names of these.
        check: function that raises a `FedeltaError` if the cells of a row (column → cell) can't be used together: an
            `IncompleteRow` if it lacks something. None checks nothing.
    """

    uses: Mapping[str, Use]
    required: tuple[tuple[str, ...], ...]
    choose: "Callable[[Collection[str]], Columns] | None" = None
    check: Callable[[Mapping[str, Any]], None] | None = None

    def among(self, names: Collection[str]) -> "Columns":
        """The columns that the task reads from a source with columns of these names.

        Raises:
            FedeltaError: if the source has no columns that the task can read.
        """
        return self.choose(names) if self.choose else self

    @property
    def label(self) -> str | None:
        """The column of the label; None if the task has no labels."""
        return next((column for column, use in self.uses.items() if use in ("class", "number")), None)

    @property
    def classes(self) -> str | None:
        """The column of the classes; None if the task has no classes."""
        return next((column for column, use in self.uses.items() if use == "class"), None)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns other than the label."""
        return tuple(column for column in self.uses if column != self.label)


_TEXTS_OR_NUMBERS = {"type": "array", "items": {"anyOf": [{"type": kind} for kind in ("string", "integer", "number")]}}


def _as_text(value: object) -> object:
    """Return a number as a label is written: −1 for −1.0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return str(int(value)) if float(value).is_integer() else str(value)


class DataSettings(Settings):
    """Texts, labels and splits.

    Args:
        source: `pydoc` (docstrings and their chapters), `pydoc-functions` (signatures and what the functions do), or
            a file (CSV, TSV, JSON, JSONL, Parquet, Excel; also compressed), a pattern such as `data/*.csv` or a list of
            files (all of them training rows), a folder of files named by split, a folder that `save_to_disk` wrote, or
            a hub name. A path may name an environment variable, `${NAME}/folder` or `${NAME:-default}/folder`.
        configuration: configuration of a hub data set, for example `mrpc` of `glue`.
        text: column of the text, or two columns for pairs of texts.
        label: column of the label.
        max_length: maximum number of tokens. Longer texts are truncated.
        validation, test: share of the training rows to hold out if the source lacks this split.
        stratify: keep every class in the training rows, and in each split if it has enough rows. Rows are drawn from
            each class in proportion wherever a plain draw would lose a class. Only for tasks with classes.
        limit: maximum number of training rows, drawn at random by `split_seed`.
        evaluation_limit: maximum number of rows in each of validation and test, drawn at random by `split_seed`.
        client_validation: share of its rows that each client holds out for its own validation loss.
        splits: names of `train`, `validation` and `test` in the source if they differ, or files; null omits a split.
            GLUE keeps its test labels secret, so use {test: validation, validation: null}.
        split_seed: seed of the splits. It is separate from the run's seed, so that all seeds share one test set.
        missing: what happens to a row with an empty cell or an uncertain label. `refuse` stops with the row; `drop`
            leaves the row out, and the number of such rows is printed.
        unlabeled: values of the label that mean that a row has no label, as texts. Such rows are left out. None leaves
            out the −1 of a ClassLabel column and the `-` of SNLI, and refuses other labels that look like these. An
            empty list takes every value as a label.
        deduplicate: keep one of several rows with the same texts and label. Rows that also occur in the test split, or
            after that in the validation split, are removed from the others.
        columns: names of the columns of a CSV or TSV file without a header line.
        delimiter: character between the cells of a CSV or TSV file. None is a tab for TSV, and is found for CSV.
        quoting: whether quotes enclose cells. None means yes for CSV and no for TSV.
        encoding: encoding of text files, such as `cp1252`. None is UTF-8 or what a byte order mark says, else cp1252
            if the text looks like it.
        decimal: decimal sign of a regression's label in a text file. None is found.
    """

    source: str | Annotated[tuple[str, ...], Field(min_length=1)] = BUILT_IN
    configuration: str | None = None
    text: str | tuple[str, str] = "text"
    label: str = "label"
    max_length: int = Field(default=128, ge=2)
    validation: float = Field(default=0.1, gt=0, lt=1)
    test: float = Field(default=0.2, gt=0, lt=1)
    stratify: bool = True
    limit: int | None = Field(default=None, ge=1)
    evaluation_limit: int | None = Field(default=None, ge=1)
    client_validation: float = Field(default=0.1, ge=0, lt=1)
    split_seed: int = Field(default=0, ge=0)
    splits: dict[SplitName, str | None] = Field(default_factory=dict)
    missing: Literal["refuse", "drop"] = "refuse"
    unlabeled: Annotated[tuple[str, ...], WithJsonSchema(_TEXTS_OR_NUMBERS)] | None = None
    deduplicate: bool = False
    columns: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    delimiter: str | None = None
    quoting: bool | None = None
    encoding: str | None = None
    decimal: Literal[".", ","] | None = None

    @field_validator("unlabeled", mode="before")
    @classmethod
    def _as_texts(cls, value: object) -> object:
        """Accept `[-1]`, which YAML reads as a number."""
        if isinstance(value, list | tuple):
            return tuple(_as_text(one) for one in value)
        return value

    @field_validator("delimiter")
    @classmethod
    def _one_sign(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[^\w\r\n\"\0]", value):
            raise ValueError("expected one character that is not a letter, digit, quote or line break")
        return value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                "a".encode(codecs.lookup(value).name)
            except (LookupError, UnicodeError, ValueError) as error:
                raise ValueError("not an encoding of texts, expected one such as utf-8, cp1252 or utf-16") from error
        return value

    @model_validator(mode="after")
    def _label_is_not_a_text(self) -> "DataSettings":
        if self.label in self.text_columns:
            raise ValueError(f"text and label name the same column, {self.label!r}")
        return self

    @property
    def text_columns(self) -> tuple[str, ...]:
        return (self.text,) if isinstance(self.text, str) else self.text

    @property
    def title(self) -> str:
        """The source in one line."""
        return self.source if isinstance(self.source, str) else ", ".join(self.source)
