"""A grid: axes with named values, experiments that cross some of them, and tuning on validation data before that.

name: ranks
config: {rounds: 20}                    # keys of `fedelta run`, for every cell
axes:
  method: {replication: {method: replication}, zero padding: {method: zero-padding}}
  data: {AG News: {data.source: ag_news}, DBpedia: {data.source: fancyzhx/dbpedia_14}}
tuning: {axes: [method, data], search: {training.learning_rate: [1.0e-3, 3.0e-3]}}
experiments:
  accuracy: {axes: {data: all, method: all}, rows: method, baseline: zero padding}
sizes:                                  # each laid over all of the above; the first is the default
  small: {config: {rounds: 5}}
  full: {}
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from fedelta.errors import FedeltaError
from fedelta.runs.config_file import read_file
from fedelta.settings import Settings, explain, nearest, short

View = Literal[
    "score",
    "late-score",
    "all-scores",
    "by-axis",
    "rounds-to-target",
    "curves",
    "traffic",
    "energy",
    "deviation",
    "deviation-by-layer",
    "deviation-by-matrix",
    "deviation-by-round",
    "difference-by-round",
    "first-aggregation",
    "high-rank-clients",
]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A name that can be the name of a file."""


class Tuning(Settings):
    """Choice of keys by the best validation score; the test split is not used.

    Args:
        axes: each combination of values of these axes is tuned separately, with the same candidates.
        at: axis → value, for every other axis that the trials need.
        search: key → candidates; all combinations are tried.
        seeds: seeds of the trials; they must differ from those of the experiments.
        config: further keys that apply to the trials only.
        last: share of a trial's evaluations, from the end, whose mean score is compared; a single evaluation is noisy.
    """

    axes: tuple[str, ...] = Field(min_length=1)
    at: dict[str, str] = Field(default_factory=dict)
    search: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(1000,), min_length=1)
    config: dict[str, Any] = Field(default_factory=dict)
    last: float = Field(default=0.5, gt=0, le=1)


class Experiment(Settings):
    """A product of some axes, and the tables and plots of its results.

    Args:
        title: title of its tables and plots.
        axes: axis → values, or all values of the axis.
        config: keys that apply to its cells only.
        rows: the axis whose values are compared, as rows of tables and lines of plots. The other axes make the columns.
        baseline: the value of `rows` against which the others are tested; None means the first.
        show: tables and plots to write.
        tuned: whether its cells use the tuned keys; if false, an axis may list the candidates itself.
    """

    title: str = ""
    axes: dict[str, tuple[str, ...]]
    config: dict[str, Any] = Field(default_factory=dict)
    rows: str
    baseline: str | None = None
    show: tuple[View, ...] = ("score", "curves")
    tuned: bool = True

    @field_validator("axes", mode="before")
    @classmethod
    def _one_value(cls, axes: Any) -> Any:
        if not isinstance(axes, Mapping):
            return axes
        return {axis: (value,) if isinstance(value, str) else value for axis, value in axes.items()}

    @field_validator("axes")
    @classmethod
    def _each_once(cls, axes: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for axis, values in axes.items():
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{axis} has the values {list(values)}, expected at least one, each once")
        return axes


class Grid(Settings):
    """A grid in one of its sizes, as read from a YAML file.

    Args:
        name: name of the folder for the results.
        output: folder that holds that folder.
        size: name of this size; empty if the grid has no sizes.
        seeds: seeds of every cell of every experiment.
        config: keys of every cell.
        axes: axis → value → keys of the configuration. If two axes set the same key, the later axis wins; the keys of
            an experiment come after all axes, and tuned keys after those.
        tuning: the keys to tune; None means no tuning.
        experiments: name → experiment.
        overrides: key → value, applied after everything else.
        labels: value of an axis → its name in tables and plots.
    """

    name: Name
    output: str = "runs"
    size: Name | Literal[""] = ""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    config: dict[str, Any] = Field(default_factory=dict)
    axes: dict[str, dict[str, dict[str, Any]]]
    tuning: Tuning | None = None
    experiments: dict[Name, Experiment] = Field(min_length=1)
    overrides: dict[str, Any] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _all_values(cls, data: Any) -> Any:
        """Replace `all` by the values of the axis in their order, and an empty value by no keys."""
        axes, experiments = data.get("axes"), data.get("experiments")
        if not isinstance(axes, Mapping) or not isinstance(experiments, Mapping):
            return data
        axes = {
            axis: {name: {} if keys is None else keys for name, keys in values.items()}
            if isinstance(values, Mapping)
            else values
            for axis, values in axes.items()
        }
        data = {**data, "axes": axes}
        spelled = {}
        for name, experiment in experiments.items():
            spelled[name] = experiment
            if isinstance(experiment, Mapping) and isinstance(experiment.get("axes"), Mapping):
                chosen = {
                    axis: tuple(axes[axis]) if values == "all" and isinstance(axes.get(axis), Mapping) else values
                    for axis, values in experiment["axes"].items()
                }
                spelled[name] = {**experiment, "axes": chosen}
        return {**data, "experiments": spelled}

    @model_validator(mode="after")
    def _known(self) -> "Grid":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)}, expected each once")
        layers = [self.config, *(keys for values in self.axes.values() for keys in values.values()), self.overrides]
        for key in ("name", "output", "seed"):
            if any(key in layer for layer in layers):
                raise ValueError(f"{key}: the grid sets it for each cell, expected no such key")
        for name, experiment in self.experiments.items():
            for axis, values in experiment.axes.items():
                self._check(f"experiments.{name}.axes", axis, values)
            if experiment.rows not in experiment.axes:
                raise ValueError(f"experiments.{name}.rows is {experiment.rows!r}, expected one of its axes")
            if experiment.baseline not in (None, *experiment.axes[experiment.rows]):
                raise ValueError(f"experiments.{name}.baseline is {experiment.baseline!r}, expected one of its rows")
            for axis in self.tuning.axes if self.tuning is not None and experiment.tuned else ():
                if axis not in experiment.axes:
                    raise ValueError(f"experiments.{name} lacks the axis {axis!r}, which is tuned")
        if self.tuning is not None:
            for axis in self.tuning.axes:
                self._check("tuning.axes", axis, ())
            for axis, value in self.tuning.at.items():
                self._check("tuning.at", axis, (value,))
            if shared := set(self.tuning.seeds) & set(self.seeds):
                raise ValueError(f"tuning.seeds: {min(shared)} is also a seed of the experiments, expected other seeds")
        return self

    def _check(self, where: str, axis: str, values: tuple[str, ...]) -> None:
        if axis not in self.axes:
            raise ValueError(f"{where}: no axis {axis!r}{nearest(axis, list(self.axes))}")
        for value in values:
            if value not in self.axes[axis]:
                raise ValueError(f"{where}: axis {axis} has no value {value!r}{nearest(value, list(self.axes[axis]))}")

    def label(self, value: str) -> str:
        """The name of a value in tables and plots."""
        return self.labels.get(value, value)

    def labels_of(self, values: Iterable[str]) -> str:
        """The names of several values, separated by commas."""
        return ", ".join(map(self.label, values))

    @property
    def folder(self) -> Path:
        """The folder of its results."""
        return Path(self.output).expanduser() / self.name / self.size

    def dump(self) -> dict[str, Any]:
        """The grid in this size as plain data."""
        return self.model_dump(mode="json", exclude_defaults=True)


def load_grid(source: Path, size: str | None = None) -> Grid:
    """Read a grid in one of its sizes.

    Args:
        source: the YAML file.
        size: name of the size; None means the first.

    Raises:
        FedeltaError: one line that names the key, what was found and what was expected.
    """
    data, _ = read_file(source, "grid")
    sizes = data.pop("sizes", None) or {}
    if not isinstance(sizes, Mapping) or not all(isinstance(keys, Mapping | None) for keys in sizes.values()):
        raise FedeltaError(f"grid {source}: sizes holds {short(sizes)}, expected a name and keys for each")
    if size is None and sizes:
        size = next(iter(sizes))
    if size is not None:
        if size not in sizes:
            raise FedeltaError(f"grid {source} has no size {size!r}, found {', '.join(sizes) or 'none'}")
        data = _lay_over(data, sizes[size] or {}) | {"size": size}
    try:
        return Grid.model_validate(data)
    except ValidationError as error:
        raise FedeltaError(f"grid {source}: {explain(error, Grid)}") from error


def _lay_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings level by level; `above` wins where both have a value."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = _lay_over(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result
