"""The server, model, trainer and data that a configuration describes."""

import functools
import json
from typing import Any

import torch

from fedelta.errors import FedeltaError
from fedelta.federation.client import Trainer
from fedelta.federation.server import Server
from fedelta.learning.model.base_model import load_base, load_tokenizer, longest_text
from fedelta.learning.model.lora_model import LoraModel
from fedelta.learning.shards import FederatedData, TokenizedSplits, build_data, read_splits, tokenize_splits
from fedelta.learning.tasks import Completion
from fedelta.learning.tasks.lm_harness import check_harness
from fedelta.runs.config import Config, parse_config
from fedelta.seeds import derive_seed


def make_server(config: Config) -> Server:
    """The rules that a configuration states."""
    return Server(
        config.method.make(),
        config.federation,
        config.ranks,
        config.lora.alpha,
        config.lora.scale,
        config.seed,
    )


def make_model(config: Config, classes: int, tokenizer: Any) -> LoraModel:
    """The base model with LoRA; its new head depends on the run's seed, not on the method."""
    seed = derive_seed(config.seed, "head") % 2**32
    base = load_base(config.model, classes, tokenizer, seed, config.task.kind)
    return LoraModel(base, config.lora)


def tokenized_splits(config: Config) -> tuple[TokenizedSplits, Any]:
    """The tokenized splits of a configuration, and the tokenizer; read once for all seeds and methods."""
    return _tokenized_splits(splits_key(config))


@functools.lru_cache(maxsize=4)
def _tokenized_splits(key: str) -> tuple[TokenizedSplits, Any]:
    """Splits and tokens, read once for all seeds and methods of a comparison."""
    config = parse_config(json.loads(key))
    config.task.check_installed()
    splits, classes = read_splits(config.data, config.task)
    tokenizer = load_tokenizer(config.model)
    return tokenize_splits(config.data, config.task, splits, classes, tokenizer), tokenizer


def warm(config: Config) -> None:
    """Read and tokenize what a run needs, ahead of the runs of processes that are forked from this one.

    Raises:
        FedeltaError: if the data or the tokenizer are not there, or the harness has not what is asked of it.
    """
    if config.evaluation.harness is not None:
        check_harness(config.evaluation.harness)
    tokenized_splits(config)


def prepare(config: Config, partitioned: bool = True) -> tuple[Trainer, FederatedData]:
    """A warm model and the rows of everyone, as a configuration has them.

    Args:
        partitioned: whether the training rows are shared out to clients; else there are no shards.

    Raises:
        FedeltaError: if the model or the data are not there, or do not fit each other.
    """
    tokenized, tokenizer = tokenized_splits(config)
    data = FederatedData({}, tokenized.validation, tokenized.test, tokenized.classes)
    if partitioned:
        data = build_data(tokenized, config.data, config.partition, config.seed)
    return make_trainer(config, len(data.classes), tokenizer), data


def make_trainer(config: Config, classes: int, tokenizer: Any) -> Trainer:
    """A warm model.

    Raises:
        FedeltaError: if it is not there, or does not take the configured texts.
    """
    torch.set_num_threads(config.threads)
    model = make_model(config, classes, tokenizer)
    if config.data.max_length > (longest := longest_text(model.peft.config, tokenizer)):
        raise FedeltaError(f"data.max_length is {config.data.max_length}, but the model takes {longest} tokens")
    if isinstance(config.task, Completion) and config.task.generate is not None:
        asked, new = config.data.max_length, config.task.generate.max_new_tokens
        if asked + new > longest:
            raise FedeltaError(
                f"data.max_length {asked} and task.generate.max_new_tokens {new} are together more than the {longest} "
                "tokens that the model takes"
            )
    return Trainer(model, tokenizer, config.task, config.training, config.evaluation.batch_size, config.seed)


def splits_key(config: Config) -> str:
    """The same for configurations that read the same texts into the same tokens."""
    parts = {"data": config.data, "model": config.model, "task": config.task}
    return json.dumps({name: part.model_dump() for name, part in parts.items()}, sort_keys=True)
