"""One run: from a configuration to the folder that it leaves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedelta.errors import FedeltaError
from fedelta.federation.checkpoint import Checkpoint
from fedelta.federation.client import Trainer
from fedelta.federation.engines import Observer
from fedelta.federation.engines.activation_caches import ActivationCaches
from fedelta.federation.engines.evaluation import Evaluator
from fedelta.federation.engines.local import LocalEngine
from fedelta.federation.engines.measure import fastest_stack, fastest_workers, total_gemm_rate
from fedelta.federation.engines.rounds import Engine, EngineContext
from fedelta.federation.engines.workers import Workers, can_fork
from fedelta.federation.run_folder import Result, RunFolder
from fedelta.federation.server import Server, ServerState
from fedelta.files import write_file
from fedelta.learning.shards import Shard, TokenizedSplits
from fedelta.learning.tasks import Completion
from fedelta.learning.tasks.lm_harness import check_harness, harness_scores
from fedelta.learning.training.flops import text_cost
from fedelta.lora.adapter import Adapter
from fedelta.runs.assemble import make_server, prepare, tokenized_splits
from fedelta.runs.config import Config, load_config
from fedelta.runs.export import export_state
from fedelta.runs.profile import Limit, Profile, read_profile

MakeEngine = Callable[[EngineContext, Mapping[str, Shard], int], Engine]
"""(context, client → its rows, clients in one pass) → the engine that carries the messages."""


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
    engine: MakeEngine = LocalEngine,
    sites: Mapping[str, int] | None = None,
) -> Run:
    """Run a configuration to its end and leave its folder.

    Args:
        resume: continue from the checkpoint in the run's folder, if there is one.
        observer: is told of progress.
        engine: makes what carries the messages.
        sites: client → number of rows, where clients have rows of their own; None shares out the configured ones.
        profile: measure at the end what the machine could have done at best, and leave `profile.json`.

    Raises:
        FedeltaError: for bad input; whatever rounds had finished are kept.
    """
    folder = RunFolder(config.folder, config.dump(), Config().dump())
    observer = observer or Observer()
    with folder.hold():
        server = make_server(config)
        checkpoint = folder.resume() if resume else None
        if resume and (result := folder.result()) is not None:
            observer.run_started(_title(config), config.rounds, config.rounds)
            return Run(config, folder, folder.records(), result)
        if not resume:
            folder.refuse_existing()
        _check_harness(config, server)
        return _RunSteps(config, folder, observer, server, checkpoint, sites).run(engine, profile)


def _check_harness(config: Config, server: Server) -> None:
    """Raise before the run if the harness could not judge its model at the end."""
    if config.evaluation.harness is not None:
        if server.method.personal:
            raise FedeltaError(f"evaluation.harness: method {server.method.name} has no global model")
        check_harness(config.evaluation.harness)


class _RunSteps:
    """The steps of one run, in order, and what they share.

    Args:
        checkpoint: to continue from; None starts anew.
        sites: as for `run`.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        observer: Observer,
        server: Server,
        checkpoint: Checkpoint | None,
        sites: Mapping[str, int] | None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.observer = observer
        self.server = server
        self.checkpoint = checkpoint
        self.trainer, self.data = prepare(config, partitioned=sites is None)
        self.clients = sites or {client: len(shard.train) for client, shard in self.data.shards.items()}
        self.tokenized: TokenizedSplits = tokenized_splits(config)[0]

    def run(self, make_engine: MakeEngine, profile: bool) -> Run:
        self.trainer.timed = profile
        state = self._start() if self.checkpoint is None else self._restore(self.checkpoint)
        evaluator = self._evaluator()
        state = self._rounds(make_engine, evaluator, state)
        result = self._result(state, evaluator)
        self.folder.finish(result)
        measured = self._profile(evaluator.caches) if profile else None
        return Run(self.config, self.folder, self.folder.records(), result, measured)

    def _start(self) -> ServerState:
        """The state before round 0, and the folder with its first checkpoint."""
        model = self.trainer.model
        state = self.server.start(model.shapes, model.head_tensors(), self.clients, self.data.classes)
        if self.config.training.stack == "auto":
            ranks = [state.ranks[client] for client in self.server.sample(state)]
            self.folder.settle_stack(fastest_stack(self.trainer, self.tokenized.train, ranks))
        self.folder.begin(state)
        return state

    def _restore(self, checkpoint: Checkpoint) -> ServerState:
        """The state of a checkpoint, and the trainer with what clients keep."""
        state = checkpoint.state
        if state.log.shapes != self.trainer.model.shapes or set(state.ranks) != set(self.clients):
            raise FedeltaError(f"checkpoint {self.folder.checkpoint_file} is of another model or other clients")
        self.trainer.kept.update(checkpoint.kept)
        self.trainer.error_feedback.update(checkpoint.error_feedback)
        if not self.trainer.error_feedback:
            # Over Flower, clients file what they keep themselves.
            for file in self.folder.clients_folder.glob("*.safetensors"):
                self.trainer.take_kept(file.stem, file.read_bytes())
        return state

    @property
    def _stack(self) -> int:
        """Clients in one pass; `auto` has been settled by now."""
        return int(self.folder.config["training"]["stack"])

    def _evaluator(self) -> Evaluator:
        config, trainer = self.config, self.trainer
        count = config.workers if config.workers != "auto" else fastest_workers(trainer, self.tokenized.train)
        if count > 1 and not can_fork():
            raise FedeltaError(f"workers: {count} needs Linux and a machine without a GPU, expected 1 or auto")
        workers = Workers(count, config.threads)
        # A stack runs through the whole model, so its texts need no cache.
        shards = self.data.shards if self._stack == 1 else {}
        most = config.model.activation_cache * 1e9
        caches = ActivationCaches(trainer.activation_cache, workers, self.data.validation, shards, most)
        return Evaluator(self.server, trainer, workers, self.observer, caches)

    def _rounds(self, make_engine: MakeEngine, evaluator: Evaluator, state: ServerState) -> ServerState:
        context = EngineContext(self.server, self.trainer, evaluator, self.data.validation, self.folder, self.observer)
        engine = make_engine(context, self.data.shards, self._stack)
        self.observer.run_started(_title(self.config), state.round, self.config.rounds)
        evaluation = self.config.evaluation
        return engine.run(state, self.config.rounds, evaluation.every, evaluation.clients)

    def _result(self, state: ServerState, evaluator: Evaluator) -> Result:
        """Export the final model and score it: the test split is used here, and nowhere else."""
        model = self.trainer.model
        exported = export_state(self.folder.adapter_folder, self.server, state, self.trainer.kept, model)
        last = self.folder.records()[-1]["validation"]
        validation = last or evaluator.evaluate(state, self.data.validation, "validation")
        return {
            "method": self.config.method.name,
            "seed": self.config.seed,
            "rounds": state.round,
            "classes": self.data.classes,
            "clients": dict(self.clients),
            "constant_score": self.config.task.constant_score(self.tokenized.train, self.tokenized.test),
            "validation": validation,
            "test": self._test_scores(state, evaluator),
            "adapter_rank": exported.rank,
            "lora_parameters": _parameters_by_rank(state),
            "base_parameters": model.base_parameters,
        }

    def _test_scores(self, state: ServerState, evaluator: Evaluator) -> dict[str, float]:
        scores = evaluator.evaluate(state, self.data.test, "test")
        if self.config.evaluation.harness is None:
            return scores
        assert isinstance(self.config.task, Completion)
        chat = self.config.task.makes_turns(self.trainer.tokenizer)
        return scores | harness_scores(self.trainer.model, self.trainer.tokenizer, self.config.evaluation.harness, chat)

    def _profile(self, caches: ActivationCaches) -> Profile:
        found = read_profile(self.folder, _limit(self.trainer, caches))
        write_file(self.folder.path / "profile.json", found.to_json() + "\n")
        return found


def _parameters_by_rank(state: ServerState) -> dict[str, int]:
    adapter: Adapter = state.method.adapter
    return {str(rank): adapter.truncate(rank).parameters for rank in sorted(set(state.ranks.values()))}


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
        raise FedeltaError(f"{folder}: this run has not ended; continue it with --resume")
    return Run(config, run_folder, run_folder.records(), result)
