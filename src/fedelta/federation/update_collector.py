"""The replies of a round, one at a time: check each update, count it, and pass it to the aggregation."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fedelta.errors import BadUpdate, ClientFailed, NotFinite, one_line
from fedelta.federation.reply import ClientReply
from fedelta.lora.adapter import Shapes
from fedelta.lora.contribution import Contribution
from fedelta.protocol.messages import Broadcast, ClientUpdate
from fedelta.protocol.validation import receive


class UpdateCollector:
    """Turns the replies of a round into contributions, and collects facts about each client.

    It does not store the factors of an update, so memory does not grow with the number of clients.

    Args:
        replies: the clients' replies, in the order of aggregation.
        shapes: module → (m, n) of the adapted layers.
        weights: client → w_i, or None to use its number of examples.
        heads: name → tensor of the heads that the round started from.
        refuse: whether to raise on a bad update instead of skipping it.

    Attributes:
        contributors: clients whose updates were passed on.
        skipped: client → why its update was not passed on.
        diverged: skipped clients whose update is not finite.
        versions: client → base version that it is known to have.
        losses: client → validation loss, reported by the client on request or measured by the server.
        pruned: client → rank of its update, if that is lower than the rank of its broadcast.
    """

    def __init__(
        self,
        replies: Iterable[ClientReply],
        shapes: Shapes,
        weights: Mapping[str, float | None],
        heads: Mapping[str, Tensor],
        refuse: bool,
    ) -> None:
        self._replies = replies
        self._shapes = shapes
        self._weights = weights
        self._refuse = refuse
        self._heads = heads
        self._sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in heads.items()}
        self._weight = 0.0
        self._train_losses: list[tuple[float, float]] = []
        self.contributors: list[str] = []
        self.skipped: dict[str, str] = {}
        self.diverged: set[str] = set()
        self.versions: dict[str, int] = {}
        self.losses: dict[str, float] = {}
        self.pruned: dict[str, int] = {}

    def contributions(self) -> Iterator[Contribution]:
        """Yield the usable updates.

        Raises:
            BadUpdate: on the first bad update, if `refuse` is set.
        """
        for reply in self._replies:
            contribution = self._check(reply.sent, reply.update)
            if contribution is not None:
                self._count(reply.sent, contribution)
                if reply.loss is not None:
                    self.losses[reply.client] = reply.loss
                yield contribution

    def _check(self, sent: Broadcast, update: ClientUpdate | Exception) -> Contribution | None:
        if isinstance(update, ClientUpdate):
            try:
                return receive(update, sent, self._shapes, self._weights[sent.client])
            except BadUpdate as error:
                update = error
        if isinstance(update, BadUpdate) and self._refuse:
            raise update
        reason = update.reason if isinstance(update, BadUpdate | ClientFailed) else f"{type(update).__name__}: {update}"
        self.skipped[sent.client] = one_line(reason)
        if isinstance(update, NotFinite):
            self.diverged.add(sent.client)
        return None

    def _count(self, sent: Broadcast, contribution: Contribution) -> None:
        self.contributors.append(sent.client)
        self.versions[sent.client] = sent.patch.end
        if contribution.adapter.rank < sent.rank:
            self.pruned[sent.client] = contribution.adapter.rank
        if sent.wants_validation and "validation_loss" in contribution.metrics:
            self.losses[sent.client] = contribution.metrics["validation_loss"]
        if "train_loss" in contribution.metrics:
            self._train_losses.append((contribution.weight, contribution.metrics["train_loss"]))
        self._weight += contribution.weight
        for name, total in self._sums.items():
            total += contribution.weight * contribution.heads[name].double()

    def mean_heads(self) -> dict[str, Tensor]:
        """Average the heads: Σ p_i head_i, summed in float64 and returned in the dtype of the round's heads."""
        return {name: (total / self._weight).to(self._heads[name].dtype) for name, total in self._sums.items()}

    def mean_loss(self) -> float | None:
        """Average the training losses of the contributors by weight; None if none reported it."""
        weight = sum(w for w, _ in self._train_losses)
        return sum(w * loss for w, loss in self._train_losses) / weight if weight else None
