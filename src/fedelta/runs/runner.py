"""Run one configuration from start to end and write its folder."""

import math
from collections.abc import Callable, Mapping

from fedelta.errors import Diverged, FedeltaError, listed
from fedelta.federation.checkpoint import Checkpoint
from fedelta.federation.client import Trainer
from fedelta.federation.engines import Observer
from fedelta.federation.engines.activation_caches import ActivationCaches
from fedelta.federation.engines.evaluation import Evaluator
from fedelta.federation.engines.local import LocalEngine
from fedelta.federation.engines.measure import fastest_stack, fastest_workers, total_gemm_rate
from fedelta.federation.engines.rounds import Engine, EngineContext
from fedelta.federation.engines.workers import Workers, can_fork
from fedelta.federation.generations import TEST
from fedelta.federation.records import Inputs, Result
from fedelta.federation.run_folder import RunFolder
from fedelta.federation.server import Server, ServerState
from fedelta.files import write_file
from fedelta.learning.shards import Shard, TokenizedSplits
from fedelta.learning.tasks import Answer, LanguageTask
from fedelta.learning.tasks.chat_template import ChatTemplate
from fedelta.learning.tasks.lm_harness import check_harness, harness_scores
from fedelta.learning.training.flops import text_cost
from fedelta.lora.adapter import Adapter
from fedelta.runs.assemble import make_server, prepare, tokenized_splits
from fedelta.runs.before import evaluate_before
from fedelta.runs.config import Config, with_defaults
from fedelta.runs.export import export_state, write_cards
from fedelta.runs.finished import Run, open_run
from fedelta.runs.identity import check_changes, identify, input_changes
from fedelta.runs.profile import Limit, Profile, read_profile

MakeEngine = Callable[[EngineContext, Mapping[str, Shard], int], Engine]
"""Factory of an engine: (context, client → its rows, clients stacked in one pass) → engine."""

__all__ = ["MakeEngine", "Run", "open_run", "run"]


def run(
    config: Config,
    *,
    resume: bool = False,
    observer: Observer | None = None,
    profile: bool = False,
    engine: MakeEngine = LocalEngine,
    sites: Mapping[str, int] | None = None,
    accept_changed_data: bool = False,
) -> Run:
    """Run a configuration to its last round and write its folder.

    Args:
        config: configuration of the run.
        resume: continue from the checkpoint in the run's folder, if there is one.
        observer: receives progress events.
        profile: measure the limit of the machine at the end, and write `profile.json`.
        engine: factory of the engine that carries messages between server and clients.
        sites: client → number of rows, for clients that hold their own rows. None divides the configured rows among
            the clients.
        accept_changed_data: resume even if rows, tokenizer or base model are not those of the finished rounds. The
            result then says what had changed.

    Raises:
        FedeltaError: if the input is not valid. Finished rounds are kept.
    """
    folder = RunFolder(config.folder, config.dump(), with_defaults)
    observer = observer or Observer()
    with folder.hold():
        server = make_server(config)
        checkpoint = folder.resume(observer.warn) if resume else None
        if resume and (result := folder.finished_result(checkpoint)) is not None:
            _check_finished_inputs(config, folder, result, accept_changed_data)
            if checkpoint is not None:
                folder.rewind(checkpoint)
            records = folder.check_finished(result)
            observer.run_started(_title(config), config.rounds, config.rounds)
            return Run(config, folder, records, result)
        if not resume:
            folder.refuse_existing()
        _check_harness(config, server)
        folder.inputs = identify(config)
        if checkpoint is not None:
            _accept_inputs(folder, checkpoint, accept_changed_data, observer)
            folder.rewind(checkpoint)
        return _RunSteps(config, folder, observer, server, checkpoint, sites).run(engine, profile)


def _accept_inputs(folder: RunFolder, checkpoint: Checkpoint, accept: bool, observer: Observer) -> None:
    """Compare the inputs with those of a checkpoint, and record changes that are accepted.

    Raises:
        FedeltaError: if there are changes that are not accepted.
    """
    changes = input_changes(checkpoint.history.inputs, folder.inputs)
    check_changes(str(folder.path), changes, accept)
    folder.accepted = checkpoint.history.accepted
    if changes:
        folder.accepted += ({"round": checkpoint.state.round, "changes": changes},)
        observer.warn(f"{folder.path} continues with changed inputs: {'; '.join(changes)}")


def _check_finished_inputs(config: Config, folder: RunFolder, result: Result, accept: bool) -> None:
    """Raise if a finished run has learned from other inputs than those that are there now, unless that is accepted."""
    try:
        now: Inputs = identify(config)
    except FedeltaError:
        # The result remains what it is, even if its data are no longer on this machine.
        return
    check_changes(str(folder.path), input_changes(result.get("inputs", {}), now), accept)


def _check_harness(config: Config, server: Server) -> None:
    """Raise before the run if lm-evaluation-harness cannot evaluate the final model."""
    if config.evaluation.harness is not None:
        if server.method.personal:
            raise FedeltaError(f"evaluation.harness: method {server.method.name} has no global model")
        check_harness(config.evaluation.harness)


class _RunSteps:
    """Steps of one run, in order, and the objects that they share.

    Args:
        checkpoint: checkpoint to resume from. None starts a new run.
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
        # Loading the model may have brought it to this machine.
        folder.inputs = identify(config)
        self.clients = sites or {client: shard.train.row_count for client, shard in self.data.shards.items()}
        self.tokenized: TokenizedSplits = tokenized_splits(config)[0]

    def run(self, make_engine: MakeEngine, profile: bool) -> Run:
        self.trainer.timed = profile
        state = self._start() if self.checkpoint is None else self._restore(self.checkpoint)
        evaluator = self._evaluator()
        if self.checkpoint is None:
            self._begin(state, evaluator)
        state = self._rounds(make_engine, evaluator, state)
        result = self._result(state, evaluator)
        self.folder.finish(result)
        result = self.folder.result() or result
        measured = self._profile(evaluator.caches) if profile else None
        return Run(self.config, self.folder, self.folder.records(), result, measured)

    def _start(self) -> ServerState:
        """Return the state before round 0."""
        model = self.trainer.model
        state = self.server.start(model.shapes, model.head_tensors(), self.clients, self.data.classes)
        if self.config.training.stack == "auto":
            ranks = [state.ranks[client] for client in self.server.sample(state)]
            self.folder.settle_stack(fastest_stack(self.trainer, self.tokenized.train, ranks))
        return state

    def _begin(self, state: ServerState, evaluator: Evaluator) -> None:
        """Evaluate the initial model if that is configured, and write the first checkpoint."""
        answers: list[Answer] = []
        if self.config.evaluation.before:
            scores, answers = evaluate_before(self.config, state, evaluator, self.data.test)
            self.folder.test_before = self._finite(scores, "scores before training")
        self.folder.begin(state, answers)

    def _restore(self, checkpoint: Checkpoint) -> ServerState:
        """Return the state of a checkpoint, and load the factors and error feedback that clients keep."""
        state = checkpoint.state
        if state.log.shapes != self.trainer.model.shapes or set(state.ranks) != set(self.clients):
            raise FedeltaError(f"checkpoint {self.folder.checkpoint_file} belongs to another model or other clients")
        self.trainer.kept.update(checkpoint.kept)
        self.trainer.error_feedback.update(checkpoint.error_feedback)
        if not self.trainer.error_feedback:
            # Over Flower, each client writes its kept factors and error feedback to a file.
            for file in self.folder.clients_folder.glob("*.safetensors"):
                try:
                    self.trainer.take_kept(file.stem, file.read_bytes())
                except FedeltaError as error:
                    raise FedeltaError(f"{file}: {error}") from error
        return state

    @property
    def _stack(self) -> int:
        """Number of clients in one pass. `auto` has been replaced by a number before this is read."""
        return int(self.folder.config["training"]["stack"])

    def _evaluator(self) -> Evaluator:
        config, trainer = self.config, self.trainer
        count = config.workers if config.workers != "auto" else fastest_workers(trainer, self.tokenized.train)
        if count > 1 and not can_fork():
            raise FedeltaError(f"workers: {count} needs Linux and a model on the CPU, expected 1 or auto")
        workers = Workers(count, config.threads)
        # Stacked clients and packed texts run through the whole model, so their texts need no activation cache.
        shards = self.data.shards if self._stack == 1 and not config.training.packing else {}
        max_bytes = config.model.activation_cache * 1e9
        caches = ActivationCaches(trainer.activation_cache, workers, self.data.validation, shards, max_bytes)
        return Evaluator(self.server, trainer, workers, self.observer, caches)

    def _rounds(self, make_engine: MakeEngine, evaluator: Evaluator, state: ServerState) -> ServerState:
        context = EngineContext(self.server, self.trainer, evaluator, self.data.validation, self.folder, self.observer)
        engine = make_engine(context, self.data.shards, self._stack)
        self.observer.run_started(_title(self.config), state.round, self.config.rounds)
        evaluation = self.config.evaluation
        return engine.run(state, self.config.rounds, evaluation.every, evaluation.clients)

    def _result(self, state: ServerState, evaluator: Evaluator) -> Result:
        """Export the final model and score it. The test split is used only here."""
        self.folder.check_unchanged()
        model, tokenizer = self.trainer.model, self.trainer.tokenizer
        exported = export_state(self.folder.adapter_folder, self.server, state, self.trainer.kept, model, tokenizer)
        last_scores = self.folder.records()[-1]["validation"]
        validation = last_scores or evaluator.evaluate(state, self.data.validation, "validation")
        result: Result = {
            "method": self.config.method.name,
            "seed": self.config.seed,
            "rounds": state.round,
            "classes": self.data.classes,
            # The clients of the last round: sites may have joined and left since the first one.
            "clients": {client: self.clients.get(client, 0) for client in sorted(state.ranks)},
            "constant_score": self.config.task.constant_score(self.tokenized.train, self.tokenized.test),
            "validation": validation,
            "test": self._test_scores(state, evaluator),
            "adapter_rank": exported.rank,
            "lora_parameters": _parameters_by_rank(state),
            "base_parameters": model.base_parameters,
        }
        if self.folder.test_before is not None:
            # A checkpoint sorts its keys.
            result["test_before"] = dict(sorted(self.folder.test_before.items()))
        write_cards(self.folder.adapter_folder, self.config, state, result)
        return result

    def _test_scores(self, state: ServerState, evaluator: Evaluator) -> dict[str, float]:
        answers: list[Answer] = []
        scores = evaluator.evaluate(state, self.data.test, "test", answers=answers)
        self.folder.generations.add(answers, TEST, "test")
        if self.config.evaluation.harness is not None:
            scores |= self._harness_scores()
        metric = self.config.task.metric
        if not math.isfinite(scores[metric]):
            raise Diverged(f"the test score {metric} is not finite because the model diverged")
        return self._finite(scores, "test scores")

    def _finite(self, scores: Mapping[str, float], what: str) -> dict[str, float]:
        """Leave out scores that are not finite, with a warning."""
        bad = [name for name, score in scores.items() if not math.isfinite(score)]
        if bad:
            self.observer.warn(f"{what} that are not finite are left out: {listed(bad)}")
        return {name: score for name, score in scores.items() if name not in bad}

    def _harness_scores(self) -> dict[str, float]:
        task, settings = self.config.task, self.config.evaluation.harness
        assert isinstance(task, LanguageTask)
        assert settings is not None
        tokenizer = self.trainer.tokenizer
        chat = ChatTemplate(tokenizer, task.date) if task.turns(tokenizer) else None
        return harness_scores(self.trainer.model, tokenizer, settings, chat)

    def _profile(self, caches: ActivationCaches) -> Profile:
        profile = read_profile(self.folder, _limit(self.trainer, caches))
        write_file(self.folder.path / "profile.json", profile.to_json() + "\n")
        return profile


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
