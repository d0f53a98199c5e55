"""Configuration of a run: all its settings with their rules. `config_file.py` reads them from a file."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from fedelta.errors import FedeltaError
from fedelta.federation.ranks import RankSettings
from fedelta.federation.settings import FederationSettings
from fedelta.learning.data import DataSettings, PartitionSettings
from fedelta.learning.model.base_model import ModelSettings
from fedelta.learning.model.lora_model import LoraSettings
from fedelta.learning.tasks import Classification, Completion, Conversation, LanguageTask, Regression
from fedelta.learning.tasks.lm_harness import HarnessSettings
from fedelta.learning.training import TrainingSettings
from fedelta.methods import Method, make_method, resolve
from fedelta.runs.config_file import method_settings, read_configuration, spell_task
from fedelta.settings import MAX_COUNT, Settings, explain, short


class EvaluationSettings(Settings):
    """How the server evaluates the global model (section `evaluation`).

    Args:
        every: evaluate on the validation split every this many rounds, and after the last round. The test split is
            used once, after the last round.
        batch_size: number of texts per batch.
        before: also evaluate the initial model on the test split, before the first round, as `test_before` of the
            result. Nothing in the training depends on it.
        clients: number of first rounds in which the server also evaluates the model of each client on the validation
            split, after local training and before aggregation. 0 evaluates no client models.
        harness: tasks that lm-evaluation-harness runs once on the final model, in addition to the test split. Only for
            tasks of language models. None does not run the harness.
        target: validation score for "rounds to target" in reports. None uses a score that is 5 % short of the best
            final score among the compared runs.
    """

    every: int = Field(default=1, ge=1)
    batch_size: int = Field(default=64, ge=1)
    before: bool = False
    clients: int = Field(default=0, ge=0)
    harness: HarnessSettings | None = None
    target: float | None = Field(default=None, gt=0)


class MethodSettings(Settings):
    """An aggregation method and its options (section `method`).

    In a file, `method: fedex` is a name with default options, and `method: {name: fedex, residual: rank=8}` has options
    next to the name. `fedelta methods` lists names and options.

    Args:
        name: name of a registered method. An alias is replaced by the name that it stands for.
        options: option → value. Missing options have the method's defaults.
    """

    name: str = "replication"
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _resolve_alias(cls, name: str) -> str:
        return resolve(name)

    def make(self) -> Method:
        """Create the method.

        Raises:
            FedeltaError: if the name or an option is unknown, or the value of an option is not valid.
        """
        return make_method(self.name, **self.options)


class CompareSettings(Settings):
    """Defaults of `fedelta compare` (section `compare`).

    Args:
        methods: names of the methods to compare, each once.
        seeds: number of runs of each method, with the seeds `seed`, `seed + 1`, and so on.
    """

    methods: tuple[str, ...] = Field(default=("zero-padding", "replication", "fedex"), min_length=1)
    seeds: int = Field(default=1, ge=1, le=10_000)


class Config(Settings):
    """Configuration of one run.

    Every key has a default, and an unknown key is an error. The keys from `task` to `compare` are sections with a class
    each.

    Args:
        name: name of the run and of its folder. It starts with a letter or digit and has letters, digits, `.`, `_` and
            `-`.
        output: parent folder of the run's folder. `~` is the home directory.
        seed: seed of every random choice of the run: the division of rows, initial adapters and new heads, sampling of
            clients, and order of training rows. `data.split_seed` is separate.
        rounds: number of communication rounds.
        workers: number of processes that train the clients of a round. `auto` measures which number is fastest. The
            result does not depend on it, to the last bit.
        threads: number of torch threads per process. More than 1 needs `workers: 1`. It is meant for models so large
            that a single client uses the whole machine. Results can differ in their last bits between thread counts.
        method: aggregation method, as a name or as a mapping with its options.
        task: what the model learns. The key `kind` is `classification`, `regression`, `completion` or
            `conversation`; without it, the task is a classification.
        model: base model.
        lora: scaling, dropout and target modules of the adapters.
        ranks: rank of each client's adapter.
        data: source, columns, splits and length of the texts.
        partition: how the training rows are divided among clients.
        federation: participation, weights, message precision and failure handling.
        training: local training of a client in one round.
        evaluation: how the server evaluates the global model.
        compare: methods and seeds of `fedelta compare`. A single run ignores it.
    """

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    output: str = "runs"
    seed: int = Field(default=0, ge=0)
    rounds: int = Field(default=10, ge=1, le=MAX_COUNT)
    workers: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    threads: int = Field(default=1, ge=1, le=1024)
    method: MethodSettings = MethodSettings()
    task: Annotated[Classification | Regression | Completion | Conversation, Field(discriminator="kind")] = (
        Classification()
    )
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
        """Accept `task: regression`, and `task: {metric: matthews}` for the default kind."""
        value = spell_task(value)
        return {"kind": "classification", **value} if isinstance(value, Mapping) else value

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        """Accept `method: fedex`, and `method: {name: fedex, option: …}` with options next to the name."""
        return method_settings(value)

    @model_validator(mode="after")
    def _check_loss_rows(self) -> "Config":
        if self.ranks.by_loss and self.ranks.loss_on == "own" and self.data.client_validation == 0:
            raise ValueError(
                f"ranks.allocation: {self.ranks.allocation} with loss_on: own needs rows that clients hold out, "
                f"expected data.client_validation above 0"
            )
        return self

    @model_validator(mode="after")
    def _check_harness_task(self) -> "Config":
        if self.evaluation.harness is not None and self.task.model_kind != "completion":
            raise ValueError(
                "evaluation.harness needs a language model, expected task: completion or conversation, "
                f"found {self.task.kind}"
            )
        return self

    @model_validator(mode="after")
    def _check_packing_task(self) -> "Config":
        if self.training.packing and not isinstance(self.task, LanguageTask):
            raise ValueError(
                f"training.packing: true needs a language model, expected task: completion, found {self.task.kind}"
            )
        return self

    @model_validator(mode="after")
    def _check_partition_labels(self) -> "Config":
        if self.task.model_kind != "classification" and self.partition.kind not in ("iid", "natural"):
            raise ValueError(
                f"partition.kind: {self.partition.kind} needs classes, but task {self.task.kind} has none; "
                "expected iid, or natural by a column"
            )
        return self

    @model_validator(mode="after")
    def _check_threads(self) -> "Config":
        if self.threads > 1 and self.workers != 1:
            raise ValueError(f"threads: {self.threads} needs workers: 1, found workers: {self.workers}")
        return self

    @model_validator(mode="after")
    def _check_pattern(self) -> "Config":
        targets = self.lora.target_modules
        try:
            re.compile(targets if isinstance(targets, str) else "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"lora.target_modules: {short(targets)} is not a valid pattern: {error}") from error
        return self

    @property
    def folder(self) -> Path:
        """Folder of the run's files."""
        return Path(self.output).expanduser() / self.name

    def dump(self) -> dict[str, Any]:
        """Return plain data with every default, and with `method` in the form that a file has."""
        data = self.model_dump(mode="json")
        data["method"] = {"name": self.method.name, **self.method.options}
        return data


def load_config(source: Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, or the built-in example, and apply overrides.

    Args:
        source: path of the file. None reads the built-in example.
        overrides: `key=value` strings such as `training.steps=5`.

    Raises:
        FedeltaError: if the file, a key or a value is not valid. Its one line names the file, the key, the value and
            what was expected.
    """
    return parse_config(*read_configuration(source, overrides))


def with_defaults(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration that was written down, with the defaults of keys that did not exist then.

    It is returned as it is if it is not valid today.
    """
    try:
        return parse_config(data).dump()
    except FedeltaError:
        return data


def parse_config(data: Mapping[str, Any], name: str = "configuration") -> Config:
    """Check plain data and return it as a `Config`.

    Args:
        data: keys and values, as read from YAML.
        name: name of the source in error messages.

    Raises:
        FedeltaError: if a key or value is not valid. Its one line names the key, the value and what was expected.
    """
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise FedeltaError(f"{name}: {explain(error, Config)}") from error
    config.method.make()
    return config
