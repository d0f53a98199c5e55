"""The replies of a round, one at a time: check each update, count it, and pass it to the aggregation."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fedelta.errors import BadUpdate, ClientFailed, NotFinite, one_line
from fedelta.federation.outliers import Growth, growth, is_suspect, outlier_reason
from fedelta.federation.reply import ClientReply
from fedelta.lora.adapter import Shapes
from fedelta.lora.contribution import Contribution, Norms
from fedelta.protocol.messages import ClientUpdate
from fedelta.protocol.validation import receive


class UpdateCollector:
    """Turns the replies of a round into contributions, and collects facts about each client.

    It stores the factors of an update only if it may be an outlier of the round (`outliers.py`), so memory does not
    grow with the number of clients.

    Args:
        replies: the clients' replies, in the order of aggregation.
        shapes: module → (m, n) of the adapted layers.
        weights: client → w_i, or None to use its number of examples.
        heads: name → tensor of the heads that the round started from.
        refuse: whether to raise on a bad update instead of skipping it.
        max_growth: largest growth of an update, see `outliers.py`.

    Attributes:
        contributors: clients whose updates were passed on.
        skipped: client → why its update was not passed on.
        diverged: skipped clients whose update is not finite.
        versions: client → base version that it is known to have.
        losses: client → validation loss, reported by the client on request or measured by the server.
        pruned: client → rank of its update, if that is lower than the rank of its broadcast.
        weights: contributor → w_i.
        norms: contributor → norms of its adapter and heads.
    """

    def __init__(
        self,
        replies: Iterable[ClientReply],
        shapes: Shapes,
        weights: Mapping[str, float | None],
        heads: Mapping[str, Tensor],
        refuse: bool,
        max_growth: float,
    ) -> None:
        self._replies = replies
        self._shapes = shapes
        self._weights = weights
        self._refuse = refuse
        self._max_growth = max_growth
        self._growth: dict[str, Growth] = {}
        self._heads = heads
        self._sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in heads.items()}
        self._train_losses: list[tuple[float, float]] = []
        self.contributors: list[str] = []
        self.skipped: dict[str, str] = {}
        self.diverged: set[str] = set()
        self.versions: dict[str, int] = {}
        self.losses: dict[str, float] = {}
        self.pruned: dict[str, int] = {}
        self.weights: dict[str, float] = {}
        self.norms: dict[str, Norms] = {}

    def contributions(self) -> Iterator[Contribution]:
        """Yield the usable updates: in the order of the replies, and those that had to be compared last.

        Raises:
            BadUpdate: on the first bad update, if `refuse` is set.
        """
        suspects: list[tuple[ClientReply, Contribution]] = []
        for reply in self._replies:
            contribution = self._check(reply)
            if contribution is None:
                continue
            self._growth[reply.client] = growth(contribution)
            if is_suspect(self._growth[reply.client], self._max_growth):
                suspects.append((reply._replace(update=ClientFailed(reply.client, "compared")), contribution))
                continue
            self._count(reply, contribution)
            yield contribution
        for reply, contribution in suspects:
            reason = outlier_reason(reply.client, self._growth, self._max_growth)
            if reason is not None:
                self._skip(reply.client, BadUpdate(reply.client, reason))
                continue
            self._count(reply, contribution)
            yield contribution

    def _check(self, reply: ClientReply) -> Contribution | None:
        update = reply.update
        if isinstance(update, ClientUpdate):
            try:
                return receive(update, reply.sent, self._shapes, self._weights[reply.client], reply.rows)
            except BadUpdate as error:
                update = error
        self._skip(reply.client, update)
        return None

    def _skip(self, client: str, error: Exception) -> None:
        if isinstance(error, BadUpdate) and self._refuse:
            raise error
        reason = error.reason if isinstance(error, BadUpdate | ClientFailed) else f"{type(error).__name__}: {error}"
        self.skipped[client] = one_line(reason)
        if isinstance(error, NotFinite):
            self.diverged.add(client)

    def _count(self, reply: ClientReply, contribution: Contribution) -> None:
        client, sent, weight = reply.client, reply.sent, contribution.weight
        self.contributors.append(client)
        self.versions[client] = sent.patch.end
        self.weights[client], self.norms[client] = weight, contribution.norms
        if contribution.adapter.rank < sent.rank:
            self.pruned[client] = contribution.adapter.rank
        if reply.loss is not None:
            self.losses[client] = reply.loss
        elif sent.wants_validation and "validation_loss" in contribution.metrics:
            self.losses[client] = contribution.metrics["validation_loss"]
        if "train_loss" in contribution.metrics:
            self._train_losses.append((weight, contribution.metrics["train_loss"]))
        for name, total in self._sums.items():
            total += weight * contribution.heads[name].double()

    def shares(self) -> dict[str, float]:
        """Share p_i of each contributor in the mean, before a weighting by norms."""
        total = sum(self.weights.values())
        return {client: weight / total for client, weight in self.weights.items()}

    def mean_heads(self) -> dict[str, Tensor]:
        """Average the heads: Σ p_i head_i, summed in float64 and returned in the dtype of the round's heads."""
        weight = sum(self.weights.values())
        return {name: (total / weight).to(self._heads[name].dtype) for name, total in self._sums.items()}

    def mean_loss(self) -> float | None:
        """Average the training losses of the contributors by weight; None if none reported it."""
        weight = sum(w for w, _ in self._train_losses)
        return sum(w * loss for w, loss in self._train_losses) / weight if weight else None
