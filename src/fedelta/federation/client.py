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
from fedelta.learning.training.stacked import StackedClient, reason_not_to_stack, train_stacked
from fedelta.learning.training.stopwatch import Stopwatch
from fedelta.lora.adapter import Adapter, finite
from fedelta.lora.lowrank import LowRank
from fedelta.lora.patch_log import PatchedBase
from fedelta.methods import Method, make_method
from fedelta.protocol.compression import LOSSLESS, Basis, Encoded, ErrorFeedback, compensate
from fedelta.protocol.factor_plan import select_factors
from fedelta.protocol.messages import Broadcast, ClientUpdate
from fedelta.protocol.serialization import (
    adapter_tensors,
    error_feedback_tensors,
    pack_sealed,
    take_adapter,
    take_error_feedback,
    unpack_sealed,
)
from fedelta.seeds import derive_seed


@dataclass(frozen=True, eq=False)
class _Task:
    """One client's work in one round, decoded from its broadcast."""

    broadcast: Broadcast
    method: Method
    start: Adapter
    shard: Shard
    seed: int


def pack_kept(adapter: Adapter | None, feedback: ErrorFeedback | None) -> bytes:
    """Serialize what a client keeps between rounds, for `Trainer.take_kept`; empty if both arguments are None."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    if adapter is not None:
        tensors |= adapter_tensors("kept/", adapter)
        facts["scale"] = next(iter(adapter.values())).scale
    if feedback is not None:
        tensors |= error_feedback_tensors("left", feedback)
        facts["feedback"] = feedback.facts
    return pack_sealed(tensors, facts) if facts else b""


class Trainer:
    """Trains clients on one loaded model: takes the bytes of a broadcast and returns the bytes of the update.

    In process, one trainer serves all clients in turn. In a deployment, each site has its own trainer. Between rounds
    a trainer keeps the base patches that it has folded in, `kept` and `error_feedback`, and nothing else.

    Args:
        model: the base model with LoRA layers. Each broadcast replaces its adapter and heads.
        tokenizer: the model's tokenizer; it pads batches.
        task: the task to learn.
        settings: settings of local training.
        evaluation_batch: texts per batch of evaluation.
        seed: the run's seed. The seed of a client's training is derived from it, the round and the client's name.

    Attributes:
        base: the base patches folded into the model, and their version.
        kept: client → its adapter at the end of its last round, if the method keeps factors at clients.
        error_feedback: client → what compression left out of its last message, if messages are compressed.
        activation_cache: the model's cache, or None if the model can't have one. The engine decides for which texts
            it keeps activations.
        watch: counts seconds by phase, and tokens. An engine calls `start_watch` to count a part of the work apart.
        timed: whether to wait for the GPU at the end of each phase. If False, a phase ends when its work is queued.
            That is faster, but the wait is counted in the phase that reads the result.
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
        """Replace `watch` with a new stopwatch and return it."""
        self.watch = Stopwatch(partial(synchronize, self.model.device) if self.timed else None)
        return self.watch

    def catch_up(self, delta: Any) -> None:
        """Fold the base patches that this model does not have yet.

        Args:
            delta: the part of the server's patch log that a broadcast carries.

        Raises:
            FedeltaError: if the patches don't continue this base.
        """
        if self.base.apply(delta):
            self.model.patch.set(self.base.patches())

    def kept_bytes(self, client: str) -> bytes:
        """Serialize what this client keeps between rounds, to pass it between processes or to save it.

        Returns:
            The bytes for `take_kept`; empty if the client keeps nothing.
        """
        return pack_kept(self.kept.get(client), self.error_feedback.get(client))

    def take_kept(self, client: str, blob: bytes) -> None:
        """Restore what `kept_bytes` serialized for this client; empty bytes change nothing."""
        if not blob:
            return
        tensors, facts = unpack_sealed(blob, required=False)
        if "scale" in facts:
            self.kept[client] = take_adapter("kept/", facts["scale"], tensors)
        if "feedback" in facts:
            self.error_feedback[client] = take_error_feedback("left", facts["feedback"], tensors)

    def reply(self, blob: bytes, shard: Shard) -> bytes:
        """Train one client as its broadcast says.

        The base is brought up to date, the broadcast's adapter and heads are loaded, and the client trains on its
        rows. If the broadcast asks for it, the trained model is evaluated on the client's held-out rows.

        Args:
            blob: a serialized `Broadcast`.
            shard: the client's rows.

        Returns:
            A serialized `ClientUpdate`.

        Raises:
            FedeltaError: if the broadcast does not fit the model or the base, or if the client has no rows.
            DeviceError: if the device runs out of memory.
        """
        task = self._task(blob, shard)
        broadcast, model = task.broadcast, self.model
        hints = self._memory_hints(self.settings.micro_batch_size or self.settings.batch_size)
        with device_errors(f"{broadcast.client} trains", hints), self.with_tail(broadcast.tail):
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

    def _memory_hints(self, texts: int) -> list[str]:
        """Changes of settings that lower the memory of training, the most effective first.

        Args:
            texts: texts in one forward pass under the current settings.
        """
        base = self.model.peft.get_base_model()
        hints = [f"lower training.micro_batch_size (now {texts})"] if texts > 1 else []
        hints.append("lower data.max_length")
        if not uses_checkpointing(base):
            hints.append("set model.gradient_checkpointing: true")
        if self.model.dtype == torch.float32:
            hints.append("set model.dtype: bfloat16")
        return hints

    def reply_together(self, blobs: Sequence[bytes], shards: Sequence[Shard]) -> list[bytes] | None:
        """Train several clients in one pass.

        Args:
            blobs: serialized broadcasts, one per client.
            shards: the rows of the same clients, in the same order.

        Returns:
            Serialized updates in the same order, or None if these clients can only train one by one.

        Raises:
            FedeltaError: if a broadcast does not fit the model or the base, or if a client has no rows.
            DeviceError: if the device runs out of memory.
        """
        tasks = [self._task(blob, shard) for blob, shard in zip(blobs, shards, strict=True)]
        # A tail is added to the base, which the clients of a stack share. A core has a fixed basis in place of B.
        unstackable = any(task.broadcast.tail or "core" in task.broadcast.plan.train for task in tasks)
        if unstackable or reason_not_to_stack(self.model):
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
            results = train_stacked(self.model, self.tokenizer, clients, self.settings, self.watch)
        for task, result in zip(tasks, results, strict=True):
            self.model.load(result.adapter, result.heads)
            updates.append(self._update(task, result.loss))
        return updates

    def _task(self, blob: bytes, shard: Shard) -> "_Task":
        broadcast = Broadcast.from_bytes(blob)
        # Check first: a patch that does not fit must not change the base.
        start = broadcast.check(self.model.shapes, self.kept.get(broadcast.client))
        method = make_method(broadcast.method["name"], **broadcast.method["options"])
        self.catch_up(broadcast.patch)
        seed = derive_seed(self.seed, "train", broadcast.round, broadcast.client)
        return _Task(broadcast, method, start, shard, seed)

    def _update(self, task: "_Task", loss: float) -> bytes:
        """Build the client's update from the trained adapter and heads that the model holds."""
        broadcast, shard = task.broadcast, task.shard
        plan, client = broadcast.plan, broadcast.client
        metrics = {"train_loss": loss}
        if broadcast.wants_validation and len(shard.validation) > 0:
            with device_errors(f"{client} is evaluated", ["lower evaluation.batch_size"]):
                scores = evaluate(self.task, self.model, self.tokenizer, shard.validation, self.evaluation_batch)
            metrics["validation_loss"] = scores["loss"]
            self.watch.lap("evaluation")
        trained = task.method.finish(broadcast.round, task.start, self.model.read())
        # A client that diverged keeps its previous factors. The server refuses its update anyway.
        if plan.keep and all(finite(pair.A) and finite(pair.B) for pair in trained.values()):
            self.kept[client] = trained
        update = ClientUpdate(
            client=client,
            round=broadcast.round,
            rank=trained.rank,
            scale=broadcast.scale,
            version=self.base.version,
            digest=self.base.digest,
            examples=shard.train.row_count,
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
        """Add a tail to the base while the context is open.

        Args:
            tail: module → the part of the global product (m, n) that exceeds the client's rank; may be empty.
        """
        if not tail:
            yield
            return
        self.model.patch.set(self.base.patches(tail))
        try:
            yield
        finally:
            self.model.patch.set(self.base.patches())
