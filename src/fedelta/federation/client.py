"""The client's side of a round: bytes of a broadcast in, bytes of an update out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedelta.learning.device import device_errors, synchronize
from fedelta.learning.model.activation_cache import find_activation_cache
from fedelta.learning.model.checkpointing import uses_checkpointing
from fedelta.learning.model.lora_model import LoraModel
from fedelta.learning.shards import Shard
from fedelta.learning.tasks import Task, evaluate
from fedelta.learning.training import TrainingSettings, train
from fedelta.learning.training.stacked import StackedClient, can_stack, train_stacked
from fedelta.learning.training.stopwatch import Stopwatch
from fedelta.lora.adapter import Adapter, finite
from fedelta.lora.lowrank import LowRank
from fedelta.lora.patch_log import PatchedBase
from fedelta.methods import Method, make_method
from fedelta.protocol.compression import LOSSLESS, Basis, Encoded, ErrorFeedback, compensate
from fedelta.protocol.messages import Broadcast, ClientUpdate, select_factors
from fedelta.protocol.serialization import (
    adapter_tensors,
    error_feedback_tensors,
    pack,
    take_adapter,
    take_error_feedback,
    unpack,
)
from fedelta.seeds import derive_seed


@dataclass(frozen=True, eq=False)
class _Task:
    """What a broadcast asks of a client."""

    broadcast: Broadcast
    method: Method
    start: Adapter
    shard: Shard
    seed: int


def pack_kept(adapter: Adapter | None, feedback: ErrorFeedback | None) -> bytes:
    """What `Trainer.take_kept` takes; nothing of nothing."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    if adapter is not None:
        tensors |= adapter_tensors("kept/", adapter)
        facts["scale"] = next(iter(adapter.values())).scale
    if feedback is not None:
        tensors |= error_feedback_tensors("left", feedback)
        facts["feedback"] = feedback.facts
    return pack(tensors, facts) if facts else b""


class Trainer:
    """A warm model that answers broadcasts. Holds nothing of a client but the base patches and
    what a method has it keep.

    In process one trainer serves all clients in turn; a real site has its own.

    Args:
        model: its adapter is replaced by each broadcast's.
        tokenizer: pads batches.
        task: that is learned.
        settings: local training.
        evaluation_batch: texts in a batch of evaluation.
        seed: of the run.

    Attributes:
        kept: client → the adapter that it ended its last round with, where the method has it keep factors.
        error_feedback: client → what its last message left out, where messages are rounded.
        cache: of the model, if it has one; an engine decides of which texts it keeps activations.
        watch: counts seconds by phase, and tokens; an engine starts a new one for what it wants apart.
        timed: whether a phase on a GPU ends when the GPU has done it. Else it ends when the work is queued, which is
            faster, and the wait counts for the phase that reads a result.
    """

    def __init__(
        self,
        model: LoraModel,
        tokenizer: Any,
        task: Task,
        settings: TrainingSettings,
        evaluation_batch: int,
        seed: int,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.task = task
        self.settings = settings
        self.evaluation_batch = evaluation_batch
        self.seed = seed
        self.base = PatchedBase(model.patch.factor_bytes)
        self.kept: dict[str, Adapter] = {}
        self.error_feedback: dict[str, ErrorFeedback] = {}
        self.timed = False
        self.watch = Stopwatch()
        self.activation_cache = find_activation_cache(model, tokenizer)

    def start_watch(self) -> Stopwatch:
        """A new `watch`."""
        self.watch = Stopwatch(partial(synchronize, self.model.device) if self.timed else None)
        return self.watch

    def catch_up(self, delta: Any) -> None:
        """Fold the patches that this base has not seen."""
        if self.base.apply(delta):
            self.model.patch.set(self.base.patches())

    def kept_bytes(self, client: str) -> bytes:
        """What this client keeps from one round to the next, to cross from a worker or to be filed; may be nothing."""
        return pack_kept(self.kept.get(client), self.error_feedback.get(client))

    def take_kept(self, client: str, blob: bytes) -> None:
        """The other end of `kept_bytes`."""
        if not blob:
            return
        tensors, facts = unpack(blob)
        if "scale" in facts:
            self.kept[client] = take_adapter("kept/", facts["scale"], tensors)
        if "feedback" in facts:
            self.error_feedback[client] = take_error_feedback("left", facts["feedback"], tensors)

    def reply(self, blob: bytes, shard: Shard) -> bytes:
        """Train as the broadcast says and return the update.

        Args:
            blob: a `Broadcast`.
            shard: the client's rows.

        Raises:
            FedeltaError: if the broadcast does not fit the model or the base.
        """
        task = self._task(blob, shard)
        broadcast, model = task.broadcast, self.model
        smaller = self._smaller(self.settings.micro_batch_size or self.settings.batch_size)
        with device_errors(f"{broadcast.client} trains", smaller), self.with_tail(broadcast.tail):
            model.load(task.start, broadcast.heads, broadcast.plan.train, broadcast.seed)
            self.watch.lap("loading")
            loss = train(
                model,
                self.tokenizer,
                shard.train,
                self.settings,
                task.seed,
                penalty=lambda: task.method.penalty(task.start, model.live()),
                watch=self.watch,
                cache=self.activation_cache,
            )
            return self._update(task, loss)

    def _smaller(self, texts: int) -> list[str]:
        """Settings with which training would need less memory.

        Args:
            texts: in a pass now.
        """
        base = self.model.peft.get_base_model()
        found = [f"lower training.micro_batch_size (now {texts})"] if texts > 1 else []
        found.append("lower data.max_length")
        if not uses_checkpointing(base):
            found.append("set model.gradient_checkpointing: true")
        if self.model.dtype == torch.float32:
            found.append("set model.dtype: bfloat16")
        return found

    def reply_together(self, blobs: Sequence[bytes], shards: Sequence[Shard]) -> list[bytes] | None:
        """The updates of several clients that train in one pass; None where these can only train one by one.

        Raises:
            FedeltaError: if a broadcast does not fit the model or the base, or a client has nothing to train on.
        """
        tasks = [self._task(blob, shard) for blob, shard in zip(blobs, shards, strict=True)]
        # A tail is in the base, which all of a stack share; a core has a basis in the place of B.
        alone = any(task.broadcast.tail or "core" in task.broadcast.plan.train for task in tasks)
        if alone or can_stack(self.model):
            return None
        clients = [
            StackedClient(
                task.start,
                task.broadcast.heads,
                task.shard.train,
                task.seed,
                frozenset(task.broadcast.plan.train),
                partial(task.method.penalty, task.start),
            )
            for task in tasks
        ]
        self.watch.lap("loading")
        updates = []
        with device_errors(f"{len(clients)} clients train in one pass", ["lower training.stack"]):
            found = train_stacked(self.model, self.tokenizer, clients, self.settings, self.watch)
        for task, trained in zip(tasks, found, strict=True):
            self.model.load(trained.adapter, trained.heads)
            updates.append(self._update(task, trained.loss))
        return updates

    def _task(self, blob: bytes, shard: Shard) -> "_Task":
        broadcast = Broadcast.from_bytes(blob)
        self.catch_up(broadcast.patch)
        return _Task(
            broadcast,
            make_method(broadcast.method["name"], **broadcast.method["options"]),
            broadcast.adapter(self.model.shapes, self.kept.get(broadcast.client)),
            shard,
            derive_seed(self.seed, "train", broadcast.round, broadcast.client),
        )

    def _update(self, task: "_Task", loss: float) -> bytes:
        """What a client sends, after the training of what the model has loaded."""
        broadcast, shard = task.broadcast, task.shard
        plan, client = broadcast.plan, broadcast.client
        metrics = {"train_loss": loss}
        if broadcast.wants_validation and len(shard.validation) > 0:
            with device_errors(f"{client} is evaluated", ["lower evaluation.batch_size"]):
                scores = evaluate(self.task, self.model, self.tokenizer, shard.validation, self.evaluation_batch)
            metrics["validation_loss"] = scores["loss"]
            self.watch.lap("evaluation")
        trained = task.method.finish(broadcast.round, task.start, self.model.read())
        # A client that diverged keeps what it had: its update will be refused too.
        if plan.keep and all(finite(pair.A) and finite(pair.B) for pair in trained.values()):
            self.kept[client] = trained
        update = ClientUpdate(
            client=client,
            round=broadcast.round,
            rank=trained.rank,
            scale=broadcast.scale,
            version=self.base.version,
            digest=self.base.digest,
            examples=len(shard.train),
            factors=select_factors(trained, plan.up, broadcast.seed),
            heads=self.model.head_tensors(),
            metrics=metrics,
            precision=broadcast.precision,
        )
        encoded = None if broadcast.precision == LOSSLESS else self._compensated(task, update)
        blob = update.to_bytes(encoded)
        self.watch.lap("messages")
        return blob

    def _compensated(self, task: "_Task", update: ClientUpdate) -> Encoded:
        """Encode the tensors of an update plus the rounding error of the client's last update."""
        basis = Basis(task.broadcast.seed, update.rank, update.scale)
        last = self.error_feedback.get(update.client) if task.method.keeps_basis else None
        encoded, feedback = compensate(update.tensors, update.precision, update.round, basis, last)
        if all(finite(tensor) for tensor in feedback.after.values()):
            self.error_feedback[update.client] = feedback
        return encoded

    @contextmanager
    def with_tail(self, tail: Mapping[str, LowRank]) -> Iterator[None]:
        """The part of the global product that this client can't hold, in its base for as long as it trains."""
        if not tail:
            yield
            return
        self.model.patch.set(self.base.patches(tail))
        try:
            yield
        finally:
            self.model.patch.set(self.base.patches())
