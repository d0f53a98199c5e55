"""Build the server, model, trainer and data that a configuration describes."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedelta.errors import FedeltaError
from fedelta.federation.client import Trainer
from fedelta.federation.server import Server
from fedelta.files import expand_variables
from fedelta.learning.data.sources import local_places
from fedelta.learning.digests import folder_state
from fedelta.learning.in_memory import PREFIX
from fedelta.learning.model.base_model import load_base, load_tokenizer
from fedelta.learning.model.lora_model import LoraModel
from fedelta.learning.model.padding import longest_text
from fedelta.learning.model.token_check import check_tokens
from fedelta.learning.shards import FederatedData, TokenizedSplits, build_data, read_splits, tokenize_splits
from fedelta.learning.tasks import LanguageTask
from fedelta.learning.tasks.lm_harness import check_harness
from fedelta.learning.training.packing import check_packing
from fedelta.runs.config import Config, parse_config
from fedelta.seeds import derive_seed


def make_server(config: Config) -> Server:
    """Build the server of a configuration: its method, ranks, scaling and sampling."""
    return Server(
        config.method.make(),
        config.federation,
        config.ranks,
        config.lora.alpha,
        config.lora.scale,
        config.seed,
    )


def make_model(config: Config, classes: int, tokenizer: Any) -> LoraModel:
    """Load the base model and add LoRA. A new head depends on the seed of the run, not on its method."""
    seed = derive_seed(config.seed, "head") % 2**32
    base = load_base(config.model, classes, tokenizer, seed, config.task.model_kind)
    return LoraModel(base, config.lora)


class ReadInputs(NamedTuple):
    """The texts and the tokenizer of a configuration, before the texts become tokens.

    Args:
        splits: `train`, `validation` and `test` as `datasets.Dataset`.
        classes: names of the classes by index; empty if the task has none.
        tokenizer: the model's tokenizer.
    """

    splits: dict[str, Any]
    classes: list[str]
    tokenizer: Any


def read_inputs(config: Config) -> ReadInputs:
    """Read the splits and the tokenizer of a configuration, cached across seeds and methods."""
    return _read_inputs(splits_key(config))


def tokenized_splits(config: Config) -> tuple[TokenizedSplits, Any]:
    """Return the tokenized splits of a configuration and its tokenizer, cached across seeds and methods."""
    return _tokenized_splits(splits_key(config))


@functools.lru_cache(maxsize=4)
def _read_inputs(key: str) -> ReadInputs:
    config = parse_config(json.loads(key)["config"])
    config.task.check_installed()
    splits, classes = read_splits(config.data, config.task)
    return ReadInputs(splits, classes, config.task.with_template(load_tokenizer(config.model)))


@functools.lru_cache(maxsize=4)
def _tokenized_splits(key: str) -> tuple[TokenizedSplits, Any]:
    """Read and tokenize the splits of `splits_key`, once for all seeds and methods of a comparison."""
    config = parse_config(json.loads(key)["config"])
    splits, classes, tokenizer = _read_inputs(key)
    return tokenize_splits(config.data, config.task, splits, classes, tokenizer), tokenizer


def warm(config: Config) -> None:
    """Read and tokenize the data of a run, so that forked processes share them.

    Raises:
        FedeltaError: if the data or the tokenizer cannot be loaded, or lm-evaluation-harness or one of its configured
            tasks is missing.
    """
    if config.evaluation.harness is not None:
        check_harness(config.evaluation.harness)
    tokenized_splits(config)


def prepare(config: Config, partitioned: bool = True) -> tuple[Trainer, FederatedData]:
    """Load the model of a configuration and the data of its clients and server.

    Args:
        partitioned: divide the training rows among the clients. Without it there are no shards.

    Raises:
        FedeltaError: if the model or the data cannot be loaded or do not fit together.
    """
    tokenized, tokenizer = tokenized_splits(config)
    data = FederatedData({}, tokenized.validation, tokenized.test, tokenized.classes)
    if partitioned:
        data = build_data(tokenized, config.data, config.partition, config.seed)
    trainer = make_trainer(config, len(data.classes), tokenizer)
    splits = {"train": tokenized.train, "validation": tokenized.validation, "test": tokenized.test}
    check_tokens(trainer.model.peft, tokenizer, splits)
    return trainer, data


def make_trainer(config: Config, classes: int, tokenizer: Any) -> Trainer:
    """Load the model of a configuration, ready to train.

    Args:
        classes: number of classes of the new head.

    Raises:
        FedeltaError: if the model cannot be loaded, or does not accept texts as long as configured or packed texts.
    """
    torch.set_num_threads(config.threads)
    model = make_model(config, classes, tokenizer)
    if config.data.max_length > (longest := longest_text(model.peft, tokenizer)):
        raise FedeltaError(f"data.max_length is {config.data.max_length}, but the model takes {longest} tokens")
    if isinstance(config.task, LanguageTask) and config.task.generate is not None:
        prompt_length, new_tokens = config.data.max_length, config.task.generate.max_new_tokens
        if prompt_length + new_tokens > longest:
            raise FedeltaError(
                f"data.max_length {prompt_length} and task.generate.max_new_tokens {new_tokens} are together more than "
                f"the {longest} tokens that the model takes"
            )
    if config.training.packing:
        check_packing(model, tokenizer)
    return Trainer(model, tokenizer, config.task, config.training, config.evaluation.batch_size, config.seed)


def splits_key(config: Config) -> str:
    """Return a string that is equal for configurations with the same texts and tokens, as the files are now.

    It includes where the texts and the tokenizer are found and the state of those files, so that a file that was
    changed is read again in the same process.
    """
    parts = {"data": config.data, "model": config.model, "task": config.task}
    places = list(local_places(config.data))
    if not config.model.name.startswith(PREFIX):
        places.append(Path(expand_variables(config.model.name)).expanduser())
    files = {str(place): folder_state(place) for place in places}
    settings = {name: part.model_dump() for name, part in parts.items()}
    return json.dumps({"config": settings, "files": files}, sort_keys=True)
