"""From a configuration to a finished run, or to a comparison of methods on the same data and weights."""

from fedelta.runs.assemble import _tokenized_splits, splits_key, make_server, prepare
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedelta.files import write_file
from fedelta.learning.model.base_model import load_base, load_tokenizer, longest_text
from fedelta.federation.client import Trainer
from fedelta.runs.config import Config, load_config, parse_config
from fedelta.learning.shards import TokenizedSplits, FederatedData, tokenize_splits, build_data, read_splits
from fedelta.federation.engines import Observer
from fedelta.federation.engines.evaluation import Evaluator
from fedelta.federation.engines.local import LocalEngine
from fedelta.federation.engines.measure import fastest_stack, fastest_workers, total_gemm_rate
from fedelta.federation.engines.activation_caches import ActivationCaches
from fedelta.federation.engines.rounds import Engine
from fedelta.federation.engines.workers import Workers, can_fork
from fedelta.errors import FedeltaError
from fedelta.runs.export import export_state
from fedelta.learning.tasks.lm_harness import check_harness, harness_scores
from fedelta.learning.model.lora_model import LoraModel
from fedelta.runs.profile import Limit, Profile, read_profile
from fedelta.seeds import derive_seed
from fedelta.federation.server import Server
from fedelta.learning.tasks import Completion
from fedelta.federation.run_folder import Result, RunFolder
from fedelta.learning.training.flops import text_cost


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: its configuration and what its folder holds; a profile if one was asked for."""

    config: Config
    folder: RunFolder
    records: list[dict[str, Any]]
    result: Result
    profile: Profile | None = None














def run(
    config: Config,
    *,
    resume: bool = False,
    observer: Observer | None = None,
    profile: bool = False,
    engine: Callable[..., Engine] = LocalEngine,
    sites: Mapping[str, int] | None = None,
) -> Run:
    """Run a configuration to its end and leave its folder.

    Args:
        resume: go on from the checkpoint in the run's folder, if there is one.
        engine: what carries messages, made from what `LocalEngine` is made of.
        sites: client → number of rows, where clients have rows of their own; None shares out the configured ones.
        profile: measure in the end what the machine could have done at best, and leave `profile.json`.

    Raises:
        FedeltaError: for bad input; whatever rounds had finished are kept.
    """
    folder = RunFolder(config.folder, config.dump(), Config().dump())
    with folder.hold():
        return _run(config, folder, resume, observer or Observer(), profile, engine, sites)


def _run(
    config: Config,
    folder: RunFolder,
    resume: bool,
    observer: Observer,
    profile: bool,
    engine: Callable[..., Engine],
    sites: Mapping[str, int] | None,
) -> Run:
    server = make_server(config)
    if resume:
        checkpoint = folder.resume()
        result = folder.result()
        if result is not None:
            observer.run_started(_title(config), config.rounds, config.rounds)
            return Run(config, folder, folder.records(), result)
    else:
        folder.refuse_existing()
        checkpoint = None
    if config.evaluation.harness is not None:
        if server.method.personal:
            raise FedeltaError(f"evaluation.harness: method {server.method.name} has no global model")
        check_harness(config.evaluation.harness)
    trainer, data = prepare(config, partitioned=sites is None)
    trainer.timed = profile
    clients = sites or {client: len(shard.train) for client, shard in data.shards.items()}
    tokenized, model = _tokenized_splits(splits_key(config))[0], trainer.model
    if checkpoint is None:
        state = server.start(model.shapes, model.head_tensors(), clients, data.classes)
        if config.training.stack == "auto":
            ranks = [state.ranks[client] for client in server.sample(state)]
            folder.settle_stack(fastest_stack(trainer, tokenized.train, ranks))
        folder.begin(state)
    else:
        state = checkpoint.state
        if state.log.shapes != model.shapes or set(state.ranks) != set(clients):
            raise FedeltaError(f"checkpoint {folder.checkpoint_file} is of another model or other clients")
    if checkpoint is not None:
        trainer.kept.update(checkpoint.kept)
        trainer.error_feedback.update(checkpoint.error_feedback)
        if not trainer.error_feedback:
            # Over Flower, clients file what they keep themselves.
            for file in folder.clients_folder.glob("*.safetensors"):
                trainer.take_kept(file.stem, file.read_bytes())
    workers = config.workers if config.workers != "auto" else fastest_workers(trainer, tokenized.train)
    if workers > 1 and not can_fork():
        raise FedeltaError(f"workers: {workers} needs Linux and a machine without a GPU, expected 1 or auto")
    pool = Workers(workers, config.threads)
    stack = folder.config["training"]["stack"]
    # A stack goes through the whole model.
    kept = data.shards if stack == 1 else {}
    caches = ActivationCaches(trainer.activation_cache, pool, data.validation, kept, config.model.activation_cache * 1e9)
    evaluator = Evaluator(server, trainer, pool, observer, caches)
    rounds = engine(
        server,
        trainer,
        evaluator,
        data.validation,
        folder,
        observer,
        shards=data.shards,
        stack=stack,
    )
    observer.run_started(_title(config), state.round, config.rounds)
    state = rounds.run(state, config.rounds, config.evaluation.every, config.evaluation.clients)
    exported = export_state(folder.adapter_folder, server, state, trainer.kept, model)
    records = folder.records()
    validation = records[-1]["validation"] or evaluator.evaluate(state, data.validation, "validation")
    test = evaluator.evaluate(state, data.test, "test")
    if config.evaluation.harness is not None:
        assert isinstance(config.task, Completion)
        chat = config.task.makes_turns(trainer.tokenizer)
        test |= harness_scores(model, trainer.tokenizer, config.evaluation.harness, chat)
    finished: Result = {
        "method": config.method.name,
        "seed": config.seed,
        "rounds": state.round,
        "classes": data.classes,
        "clients": dict(clients),
        "constant_score": config.task.constant_score(tokenized.train, tokenized.test),
        "validation": validation,
        "test": test,
        "adapter_rank": exported.rank,
        "lora_parameters": {
            str(rank): state.method.adapter.truncate(rank).parameters for rank in sorted(set(state.ranks.values()))
        },
        "base_parameters": model.base_parameters,
    }
    folder.finish(finished)
    if not profile:
        return Run(config, folder, records, finished)
    found = read_profile(folder, _limit(trainer, caches))
    write_file(folder.path / "profile.json", found.to_json() + "\n")
    return Run(config, folder, records, finished, found)


def _limit(trainer: Trainer, caches: ActivationCaches) -> Limit:
    model, workers = trainer.model, caches.workers
    cache = trainer.activation_cache if caches.chosen else None
    training, evaluation = (text_cost(model, trainer.tokenizer, train, cache) for train in (True, False))
    return Limit(training, evaluation, total_gemm_rate(workers, model.dtype, model.device), workers.count)


def _title(config: Config) -> str:
    return f"{config.method.name}, seed {config.seed}"




def open_run(folder: Path) -> Run:
    """A finished run from its folder.

    Raises:
        FedeltaError: if there is no run, or it has not ended.
    """
    config = load_config(folder / "config.yaml")
    run_folder = RunFolder(folder, config.dump())
    result = run_folder.result()
    if result is None:
        raise FedeltaError(f"{folder}: this run has not ended; go on with it by --resume")
    return Run(config, run_folder, run_folder.records(), result)
