"""A result as a plain transformers model with PEFT: from the folder of a finished run, or from any adapter folder."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedelta.errors import FedeltaError, listed
from fedelta.learning.data import DataSettings
from fedelta.learning.in_memory import PREFIX
from fedelta.learning.model.base_model import ModelKind, ModelSettings, load_base, load_tokenizer, locate_model
from fedelta.learning.model.model_folder import read_json
from fedelta.learning.model.padding import with_padding
from fedelta.learning.model.weights import library_errors
from fedelta.learning.tasks import LanguageTask, Task
from fedelta.lora.files.locate import WEIGHTS
from fedelta.lora.files.peft_read import CONFIG
from fedelta.runs.card import LABELS
from fedelta.runs.config import Config, load_config
from fedelta.runs.task_file import read_task_file

Kind = Literal["generate", "predict"]
MOVED = "; if the base model has moved, name its folder with --base"


@dataclass(frozen=True, eq=False)
class ResultModel:
    """A loaded result.

    Args:
        place: name of the result in messages.
        model: a transformers model inside a `PeftModel`, in evaluation mode.
        tokenizer: its tokenizer.
        task: the task that it has learned; None if the adapter's folder does not say.
        data: names of the columns, and the length of a text.
        classes: names of the classes; empty if there are none.
    """

    place: str
    model: Any
    tokenizer: Any
    task: Task | None
    data: DataSettings
    classes: tuple[str, ...]


@dataclass(frozen=True)
class ResultFolder:
    """The files of a result.

    Args:
        place: name in messages.
        adapter: the adapter's folder.
        config: the run's configuration, or what `task.json` has of it; None if the folder does not say.
        base: name of the base model; None if the folder does not say.
    """

    place: str
    adapter: Path
    config: Config | None
    base: str | None

    @property
    def task(self) -> Task | None:
        return self.config.task if self.config else None

    @property
    def data(self) -> DataSettings:
        return self.config.data if self.config else DataSettings(max_length=_MAX_LENGTH)


def find_result(place: Path | str, client: str | None = None) -> ResultFolder:
    """Find the adapter that the folder of a run, or of an adapter, means.

    Args:
        place: folder of a finished run, or an adapter folder.
        client: client whose adapter is meant, if the method has no global model.

    Raises:
        FedeltaError: naming what is there instead.
    """
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise FedeltaError(f"{place}: no such folder, expected a finished run or an adapter")
    config: Config | None = None
    adapters = folder
    if (folder / "config.yaml").is_file():
        config = load_config(folder / "config.yaml")
        adapters = folder / "adapter"
        if not adapters.is_dir() or not (folder / "result.json").is_file():
            raise FedeltaError(
                f"{place}: this run has not finished; continue it with --resume, or use "
                f"`fedelta export {place} --adapter OUT` and then OUT"
            )
    elif not (folder / CONFIG).is_file() and (runs := sorted(folder.glob("*/result.json"))):
        raise FedeltaError(f"{place} holds several runs, expected one: {listed(file.parent for file in runs)}")
    adapter = _of_client(str(place), adapters, client)
    if not (adapter / WEIGHTS).is_file():
        raise FedeltaError(f"{adapter}: no {WEIGHTS}, expected the weights of a PEFT adapter")
    facts = read_task_file(adapter)
    named = read_json(adapter / CONFIG).get("base_model_name_or_path")
    base = named if isinstance(named, str) and named else None
    if config is not None:
        # A relative name means the folder that it meant when the run was made, which the adapter names in full.
        full = base is not None and Path(base).is_absolute() and not (facts and facts.built_in)
        return ResultFolder(str(place), adapter, config, base if full else config.model.name)
    if facts and facts.built_in and (base is None or not Path(base).is_dir()):
        base = facts.built_in
    return ResultFolder(str(place), adapter, facts.config if facts else None, base)


def _of_client(place: str, adapters: Path, client: str | None) -> Path:
    if (adapters / CONFIG).is_file():
        if client is not None:
            raise FedeltaError(f"{place}: --client {client[:40]}: this result has one adapter for all clients")
        return adapters
    names = sorted(file.parent.name for file in adapters.glob(f"*/{CONFIG}"))
    if not names:
        raise FedeltaError(f"{place}: no {CONFIG}, expected a finished run or a PEFT adapter")
    if client is None:
        raise FedeltaError(f"{place}: one adapter for each client; choose one with --client: {listed(names)}")
    if client not in names:
        raise FedeltaError(f"{place}: no client {client[:40]!r}, found {listed(names)}")
    return adapters / client


def load_result(
    place: Path | str,
    kind: Kind,
    *,
    client: str | None = None,
    base: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> ResultModel:
    """Load a result: the base model by transformers, and the adapter by PEFT.

    Args:
        place: folder of a finished run, or an adapter folder.
        kind: what it must be able to do.
        client: client whose adapter is meant, if the method has no global model.
        base: folder or name of the base model. None takes the one that the result names.
        device: `auto`, `cpu` or `cuda`.
        dtype: type of the base. None takes the one of the run, or `float32`.

    Raises:
        FedeltaError: if the result does not exist, is of another kind, or its base can't be loaded.
    """
    found = find_result(place, client)
    fields = read_json(found.adapter / CONFIG)
    task_kind = _task_kind(found, fields, kind)
    classes = _classes(found, task_kind)
    name = base or found.base
    if name is None:
        raise FedeltaError(f"{found.place}: {CONFIG} names no base model; name its folder with --base")
    settings = ModelSettings(name=name, activation_cache=0.0)
    own: dict[str, Any] = {"device": device, "class_token_alone": False, "gradient_checkpointing": False}
    if found.config is not None:
        settings = found.config.model.model_copy(update={"name": name})
    if dtype is not None:
        own["dtype"] = dtype
    settings = settings.model_copy(update=own)
    _check_base(found, settings, base is not None)
    tokenizer = _tokenizer(found.adapter, settings)
    if found.config is not None:
        # The adapter of a client has no tokenizer of its own beside it.
        tokenizer = found.config.task.with_template(tokenizer)
    model = load_base(settings, len(classes), tokenizer, 0, task_kind)
    return ResultModel(
        found.place,
        _with_adapter(model, found.adapter, name),
        tokenizer,
        found.task,
        found.data,
        classes,
    )


def check_result(place: Path | str, kind: Kind, client: str | None = None) -> ResultFolder:
    """Find a result that can do what it is wanted for, without loading its model.

    Args:
        place, kind, client: as for `load_result`.

    Raises:
        FedeltaError: if the result does not exist or is of another kind.
    """
    found = find_result(place, client)
    _task_kind(found, read_json(found.adapter / CONFIG), kind)
    return found


_MAX_LENGTH = 512
"""Length of a text if an adapter's folder does not say it; a tokenizer or model may allow less."""


def _task_kind(found: ResultFolder, fields: Mapping[str, Any], kind: Kind) -> ModelKind:
    """The kind of task.

    Raises:
        FedeltaError: if a result of this kind can't do what it is loaded for.
    """
    task_kind: Any
    if found.config is not None:
        task_kind = found.config.task.model_kind
        generates = isinstance(found.config.task, LanguageTask)
    else:
        generates = fields.get("task_type") == "CAUSAL_LM"
        task_kind = "completion" if generates else "classification"
        if not generates and fields.get("task_type") != "SEQ_CLS":
            raise FedeltaError(
                f"{found.adapter}: task_type is {str(fields.get('task_type'))[:30]}, expected CAUSAL_LM or SEQ_CLS"
            )
    if generates and kind == "predict":
        raise FedeltaError(f"{found.place}: a language model writes texts; use `fedelta generate`")
    if not generates and kind == "generate":
        raise FedeltaError(f"{found.place}: a {task_kind} model does not write texts; use `fedelta predict`")
    return task_kind


def _classes(found: ResultFolder, kind: ModelKind) -> tuple[str, ...]:
    if kind != "classification":
        return ()
    file = found.adapter / LABELS
    if not file.is_file():
        raise FedeltaError(f"{found.adapter}: no {LABELS}, which has the names of the classes")
    names = read_json(file).get("id2label")
    indices = [str(i) for i in range(len(names))] if isinstance(names, dict) else []
    if not isinstance(names, dict) or len(names) < 2 or sorted(names) != sorted(indices):
        raise FedeltaError(f"{file}: expected id2label with the names of the classes 0, 1, …")
    return tuple(str(names[i]) for i in indices)


def _check_base(found: ResultFolder, settings: ModelSettings, chosen: bool) -> None:
    """Raise in one line if a local base model is not where the result says."""
    name = settings.name
    if name.startswith(PREFIX):
        return
    hint = "" if chosen else MOVED
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise FedeltaError(f"{found.place}: base model {name[:120]}: no such folder{hint}")
    try:
        locate_model(name)
    except FedeltaError as error:
        raise FedeltaError(f"{found.place}: {error}{hint}") from error


def _tokenizer(adapter: Path, settings: ModelSettings) -> Any:
    """The tokenizer beside the adapter, or that of the base model."""
    if not (adapter / "tokenizer_config.json").is_file():
        return load_tokenizer(settings)
    from transformers import AutoConfig, AutoTokenizer

    if settings.name.startswith(PREFIX):
        return load_tokenizer(settings)
    with library_errors(f"tokenizer in {adapter}"):
        config = AutoConfig.from_pretrained(locate_model(settings.name), trust_remote_code=False)
        return with_padding(AutoTokenizer.from_pretrained(adapter, trust_remote_code=False), config)


_MISFIT = re.compile(r"size mismatch for (\S+): .*?torch\.Size\(\[(.*?)\]\).*?torch\.Size\(\[(.*?)\]\)")


def _with_adapter(model: Any, adapter: Path, base: str) -> Any:
    import peft

    with library_errors(f"{adapter} does not fit the base model {base}"), warnings.catch_warnings():
        # PEFT would leave layers without their factors, and only warn.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        try:
            return peft.PeftModel.from_pretrained(model, str(adapter)).eval()
        except RuntimeError as error:
            if (misfit := _MISFIT.search(str(error))) is None:
                raise
            name, found, expected = misfit.groups()
            raise FedeltaError(
                f"{adapter} does not fit the base model {base}: {name} is ({found}), expected ({expected})"
            ) from error
