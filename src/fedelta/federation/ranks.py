"""Ranks of the clients: allocation before round 0, and promotion by validation loss.

- `uniform`: all clients have the high rank.
- `fixed`: the first clients by name have the high rank, or each client has a rank from a list.
- `random`: clients drawn by the seed have the high rank.
- `loss` (Byun & Lee, arXiv 2406.17477): all clients start at the low rank. Each reports the validation loss after its
  first local training, and the share with the lowest losses is promoted to the high rank.
- `reversed-loss`: as `loss`, but the share with the highest losses is promoted.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from fedelta.errors import FedeltaError, quantity
from fedelta.seeds import derive_seed
from fedelta.settings import MAX_RANK, Settings, quota


class RankSettings(Settings):
    """The `ranks` section: which client gets which LoRA rank.

    Args:
        allocation: rule that assigns ranks. `uniform`: every client gets `high`. `fixed`: the first `share` of the
            clients by name get `high`, or ranks are listed in `per_client`. `random`: a `share` of the clients, drawn
            by the seed, get `high`. `loss`: every client starts at `low`, and the `share` with the lowest validation
            losses after their first training is promoted to `high`. `reversed-loss`: the highest losses are promoted.
        low: the lower rank, at least 1. `uniform` ignores it.
        high: the higher rank, at least `low`. It is the rank of the server's adapter unless `per_client` is set.
        share: share of the clients that get the high rank, from 0 to 1.
        loss_on: rows on which the loss of `loss` and `reversed-loss` is measured. `own`: each client reports the loss
            on its own held-out rows; clients with the most one-sided data do best there. `server`: the server
            measures each client's model on its validation split.
        loss_rows: maximum number of rows for `loss_on: server`; None uses the whole validation split.
        per_client: with `fixed`, one rank per client in the order of their names. It replaces `low`, `high` and
            `share`.
    """

    allocation: Literal["uniform", "fixed", "random", "loss", "reversed-loss"] = "uniform"
    low: int = Field(default=4, ge=1, le=MAX_RANK)
    high: int = Field(default=16, ge=1, le=MAX_RANK)
    share: float = Field(default=0.1, ge=0, le=1)
    loss_on: Literal["own", "server"] = "own"
    loss_rows: int | None = Field(default=None, ge=1)
    per_client: tuple[Annotated[int, Field(le=MAX_RANK)], ...] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "RankSettings":
        if self.low > self.high and self.allocation != "uniform":
            raise ValueError(f"low rank {self.low} is above high rank {self.high}")
        if self.loss_rows is not None and self.loss_on != "server":
            raise ValueError(f"loss_rows needs loss_on: server, found {self.loss_on}")
        if self.per_client is not None:
            if self.allocation != "fixed":
                raise ValueError(f"per_client needs allocation: fixed, found {self.allocation}")
            if min(self.per_client, default=0) < 1:
                raise ValueError(f"every rank in per_client is at least 1, found {min(self.per_client, default=0)}")
        return self

    @property
    def largest(self) -> int:
        """Rank R of the server's adapter, the largest rank that a client can have."""
        return max(self.per_client) if self.per_client else self.high

    @property
    def by_loss(self) -> bool:
        """Whether ranks depend on the loss after each client's first training."""
        return self.allocation in ("loss", "reversed-loss")

    @property
    def mixed(self) -> bool:
        """Whether clients can have different ranks at any time in the run."""
        if self.per_client:
            return len(set(self.per_client)) > 1
        return self.allocation != "uniform" and self.low != self.high


def initial_ranks(clients: Sequence[str], settings: RankSettings, seed: int) -> dict[str, int]:
    """Assign each client its rank before round 0.

    Args:
        clients: names of all clients, sorted.
        settings: the rule of allocation.
        seed: the run's seed, for `random`.

    Raises:
        FedeltaError: if `per_client` does not have one rank for each client.
    """
    if settings.allocation == "uniform":
        return dict.fromkeys(clients, settings.high)
    if settings.by_loss:
        return dict.fromkeys(clients, settings.low)
    if settings.per_client is not None:
        if len(settings.per_client) != len(clients):
            raise FedeltaError(
                f"ranks.per_client has {quantity(len(settings.per_client), 'rank')}, "
                f"expected one for each of {quantity(len(clients), 'client')}"
            )
        return dict(zip(clients, settings.per_client, strict=True))
    high = list(clients)
    if settings.allocation == "random":
        rng = np.random.default_rng(derive_seed(seed, "ranks"))
        high = [clients[i] for i in rng.permutation(len(clients))]
    chosen = set(high[: quota(settings.share, len(clients))])
    return {client: settings.high if client in chosen else settings.low for client in clients}


def promote(
    ranks: Mapping[str, int],
    first_losses: Mapping[str, float],
    newcomers: Mapping[str, float],
    settings: RankSettings,
) -> dict[str, int]:
    """Promote clients after a round in which some of them reported their first validation loss.

    Byun & Lee (arXiv 2406.17477) promote the best share of all clients once all have reported. With partial
    participation, first losses arrive over many rounds and from better and better global models, so losses of
    different rounds are not comparable. This function therefore compares only the clients that report in this round,
    because they all started from the same model. Of these it promotes the clients with the lowest losses (the highest
    for `reversed-loss`); ties are broken by name. With c clients reported so far, including this round, the number of
    promoted clients rises to `share`·c, rounded to the nearest integer. No client is demoted.

    Args:
        ranks: client → rank before the promotion.
        first_losses: client → first loss, of the clients that reported in earlier rounds.
        newcomers: client → first loss, of the clients that report in this round.
        settings: the rule of allocation. If it is not by loss, the ranks stay as they are.

    Returns:
        Client → rank after the promotion.
    """
    if not settings.by_loss or not newcomers:
        return dict(ranks)
    promoted = sum(ranks[client] == settings.high for client in first_losses)
    places = max(0, quota(settings.share, len(first_losses) + len(newcomers)) - promoted)
    sign = -1 if settings.allocation == "reversed-loss" else 1
    chosen = sorted(newcomers, key=lambda client: (sign * newcomers[client], client))[:places]
    return {**ranks, **dict.fromkeys(chosen, settings.high)}
