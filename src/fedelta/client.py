"""The client's side of a round: bytes of a broadcast in, bytes of an update out."""

from typing import Any

from fedelta.data import Shard
from fedelta.messages import Broadcast, ClientUpdate
from fedelta.model import LoraModel
from fedelta.patch_log import PatchedBase
from fedelta.seeds import derive_seed
from fedelta.training import TrainingSettings, evaluate, train


class Trainer:
    """A warm model that answers broadcasts. Holds nothing of a client but the base patches.

    In process one trainer serves all clients in turn; a real site has its own.

    Args:
        model: its adapter is replaced by each broadcast's.
        tokenizer: pads batches.
        settings: local training.
        evaluation_batch: texts in a batch of evaluation.
        seed: of the run.
    """

    def __init__(
        self, model: LoraModel, tokenizer: Any, settings: TrainingSettings, evaluation_batch: int, seed: int
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.evaluation_batch = evaluation_batch
        self.seed = seed
        self.base = PatchedBase()

    def catch_up(self, delta: Any) -> None:
        """Fold the patches that this base has not seen."""
        if self.base.apply(delta):
            self.model.set_patch(self.base.total)

    def answer(self, blob: bytes, shard: Shard) -> bytes:
        """Train as the broadcast says and return the update.

        Args:
            blob: a `Broadcast`.
            shard: the client's rows.

        Raises:
            FedeltaError: if the broadcast does not fit the model or the base.
        """
        broadcast = Broadcast.from_bytes(blob)
        self.catch_up(broadcast.patch)
        self.model.load(broadcast.adapter(self.model.shapes), broadcast.heads, broadcast.train)
        seed = derive_seed(self.seed, "train", broadcast.round, broadcast.client)
        metrics = {"train_loss": train(self.model, self.tokenizer, shard.train, self.settings, seed)}
        if broadcast.wants_validation and len(shard.validation) > 0:
            scores = evaluate(self.model, self.tokenizer, shard.validation, self.evaluation_batch)
            metrics["validation_loss"] = scores["loss"]
        trained = self.model.read()
        return ClientUpdate(
            client=broadcast.client,
            round=broadcast.round,
            rank=broadcast.rank,
            scale=broadcast.scale,
            version=self.base.version,
            digest=self.base.digest,
            examples=len(shard.train),
            A={module: pair.A for module, pair in trained.items()} if "A" in broadcast.train else {},
            B={module: pair.B for module, pair in trained.items()} if "B" in broadcast.train else {},
            heads=self.model.head_tensors(),
            metrics=metrics,
        ).to_bytes()
