"""The configuration of a run: one YAML, every key known, overrides as key=value."""

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from fedelta.errors import FedeltaError
from fedelta.federation.ranks import RankSettings
from fedelta.federation.settings import FederationSettings
from fedelta.learning.data import DataSettings, PartitionSettings
from fedelta.learning.model.base_model import ModelSettings
from fedelta.learning.model.lora_model import LoraSettings
from fedelta.learning.tasks import Classification, Completion, Regression
from fedelta.learning.tasks.lm_harness import HarnessSettings
from fedelta.learning.training import TrainingSettings
from fedelta.methods import Method, make_method, nearest, resolve
from fedelta.settings import Settings

DEMO = "demo.yaml"


class EvaluationSettings(Settings):
    """The server's evaluation of the global model.

    Args:
        every: rounds between evaluations on the validation split; the last round always has one. The test split is
            used once, after the last round.
        batch_size: texts in a batch.
        clients: rounds, from the first, in which the server also evaluates each client's own model on the validation
            split, before it is averaged with others.
        harness: what lm-evaluation-harness evaluates in the end, beside the test split.
        target: validation score for «rounds to target»; None takes one 5 % short of the best final one compared.
    """

    every: int = Field(default=1, ge=1)
    batch_size: int = Field(default=64, ge=1)
    clients: int = Field(default=0, ge=0)
    harness: HarnessSettings | None = None
    target: float | None = Field(default=None, gt=0)


class MethodSettings(Settings):
    """A method's name and its options."""

    name: str = "replication"
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _no_alias(cls, name: str) -> str:
        return resolve(name)

    def make(self) -> Method:
        return make_method(self.name, **self.options)


class CompareSettings(Settings):
    """What `fedelta compare` runs unless told otherwise: these methods, with the seeds seed, seed + 1, …"""

    methods: tuple[str, ...] = Field(default=("zero-padding", "replication", "fedex"), min_length=1)
    seeds: int = Field(default=1, ge=1)


class Config(Settings):
    """Everything that a run depends on.

    Args:
        workers: processes among which the clients of a round are shared out; `auto` measures what is fastest. Their
            number changes no bit of the result.
        threads: of torch in each. More than one is for a model so large that one client fills the machine: it needs
            one worker, and does change bits.
    """

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output: str = "runs"
    seed: int = Field(default=0, ge=0)
    rounds: int = Field(default=10, ge=1)
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    threads: int = Field(default=1, ge=1)
    method: MethodSettings = MethodSettings()
    task: Annotated[Classification | Regression | Completion, Field(discriminator="kind")] = Classification()
    model: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    ranks: RankSettings = RankSettings()
    data: DataSettings = DataSettings()
    partition: PartitionSettings = PartitionSettings()
    federation: FederationSettings = FederationSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    compare: CompareSettings = CompareSettings()

    @field_validator("task", mode="before")
    @classmethod
    def _task_by_kind(cls, value: Any) -> Any:
        """`task: regression`, or `task: {metric: matthews}` of the kind that is the default."""
        if isinstance(value, str):
            return {"kind": value}
        return {"kind": "classification", **value} if isinstance(value, Mapping) else value

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        """`method: fedex`, or `method: {name: fedex, option: …}` with the options beside the name."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and "options" not in value:
            return {"name": value.get("name"), "options": {k: v for k, v in value.items() if k != "name"}}
        return value

    @model_validator(mode="after")
    def _losses_to_rank_by(self) -> "Config":
        if self.ranks.by_loss and self.ranks.loss_on == "own" and self.data.client_validation == 0:
            raise ValueError(
                f"ranks.allocation: {self.ranks.allocation} needs rows that clients hold out, as data.client_validation"
            )
        return self

    @model_validator(mode="after")
    def _what_the_harness_takes(self) -> "Config":
        if self.evaluation.harness is not None and self.task.kind != "completion":
            raise ValueError(
                f"evaluation.harness is of language models, expected task: completion, found {self.task.kind}"
            )
        return self

    @model_validator(mode="after")
    def _labels_to_part_by(self) -> "Config":
        if self.task.kind != "classification" and self.partition.kind not in ("iid", "natural"):
            raise ValueError(
                f"partition.kind: {self.partition.kind} is by classes, which task {self.task.kind} has not; "
                "expected iid, or natural by a column"
            )
        return self

    @model_validator(mode="after")
    def _one_thread_in_a_worker(self) -> "Config":
        if self.threads > 1 and self.workers != 1:
            raise ValueError(f"threads: {self.threads} needs workers: 1, found workers: {self.workers}")
        return self

    @property
    def folder(self) -> Path:
        """Where the run leaves its files."""
        return Path(self.output).expanduser() / self.name

    def dump(self) -> dict[str, Any]:
        """As plain data, every default written out; `method` as it is written by hand."""
        data = self.model_dump(mode="json")
        data["method"] = {"name": self.method.name, **self.method.options}
        return data


def load_config(source: Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, or the built-in example, and apply overrides such as `training.steps=5`.

    Raises:
        FedeltaError: one line that names the key, what was found and what was expected.
    """
    name = str(source) if source else "the built-in example"
    try:
        text = source.read_text() if source else (files("fedelta.runs") / DEMO).read_text()
    except OSError as error:
        raise FedeltaError(f"configuration {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FedeltaError(f"configuration {name}: not a text file") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise FedeltaError(f"configuration {name}: {' '.join(str(error).split())}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise FedeltaError(f"configuration {name} holds a {type(data).__name__}, expected keys and values")
    for override in overrides:
        set_key(data, *read_override(override))
    return parse_config(data, name)


def parse_config(data: Mapping[str, Any], name: str = "configuration") -> Config:
    """Plain data as a `Config`, with errors for people."""
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise FedeltaError(f"{name}: {explain(error, Config)}") from error
    config.method.make()
    return config


def read_override(override: str) -> tuple[str, Any]:
    """`training.steps=5` as a key and a value of YAML.

    Raises:
        FedeltaError: if it is not of that form.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise FedeltaError(f"override {override!r}: expected key=value, such as training.steps=5")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise FedeltaError(f"override {override!r}: {' '.join(str(error).split())}") from error


def set_key(data: dict[str, Any], key: str, value: Any) -> None:
    """Set `training.steps` of a configuration as plain data; what is beside it stays."""
    *parents, last = key.split(".")
    for parent in parents:
        below = data.get(parent)
        if parent == "method" and isinstance(below, str):
            below = {"name": below}
        data[parent] = data = dict(below) if isinstance(below, Mapping) else {}
    data[last] = value


def explain(error: ValidationError, settings: type[BaseModel]) -> str:
    """The first fault that a file of these settings has, in a line."""
    first, *others = error.errors()
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(settings, first["loc"][:-1])
        return f"unknown key {where!r}{nearest(str(first['loc'][-1]), known)}{more}"
    found = first.get("input")
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(found, dict) else f", found {found!r}"
    return f"{where + ': ' if where else ''}{message[0].lower()}{message[1:]}{shown}{more}"


def _known_keys(settings: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    model: Any = settings
    for part in location:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        candidates = [field.annotation, *get_args(field.annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return list(model.model_fields) if model else []
