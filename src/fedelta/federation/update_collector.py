"""A round's replies, taken in one at a time: checked at the door, counted, and handed on to be aggregated."""

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
    """Turns replies into contributions and keeps what a round has to know of each client; the factors it lets go.

    Args:
        replies: in the order in which they are folded in.
        shapes: module → (m, n).
        weights: client → w_i, or None for its number of examples.
        heads: the round's heads, name → tensor.
        refuse: raise on a bad update instead of skipping it.

    Attributes:
        contributors: clients whose updates were handed on.
        skipped: client → why its update was not.
        diverged: those of them whose training left the finite numbers.
        versions: client → base version that it is known to hold.
        losses: client → validation loss, of those who were asked for it or judged by the server.
        pruned: client → rank, of those who sent a lower one than they were given.
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
        self._loss: list[tuple[float, float]] = []
        self.contributors: list[str] = []
        self.skipped: dict[str, str] = {}
        self.diverged: set[str] = set()
        self.versions: dict[str, int] = {}
        self.losses: dict[str, float] = {}
        self.pruned: dict[str, int] = {}

    def contributions(self) -> Iterator[Contribution]:
        """The usable updates.

        Raises:
            BadUpdate: on the first bad one, if told to refuse.
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
            self._loss.append((contribution.weight, contribution.metrics["train_loss"]))
        self._weight += contribution.weight
        for name, total in self._sums.items():
            total += contribution.weight * contribution.heads[name].double()

    def mean_heads(self) -> dict[str, Tensor]:
        """Σ p_i head_i, in the dtype of the heads before."""
        return {name: (total / self._weight).to(self._heads[name].dtype) for name, total in self._sums.items()}

    def mean_loss(self) -> float | None:
        """Training loss over contributors by weight; None if none reported it."""
        weight = sum(w for w, _ in self._loss)
        return sum(w * loss for w, loss in self._loss) / weight if weight else None
