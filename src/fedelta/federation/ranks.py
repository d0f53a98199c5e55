"""Which client gets which rank.

`uniform`: everyone the same. `fixed`: the first clients high, or a list of ranks. `random`: a seeded draw of
high clients. `loss` (Byun & Lee, 2406.17477): everyone starts low, and is judged by the validation loss after its first
local training; the best share is promoted. `reversed-loss` promotes the worst.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from fedelta.errors import FedeltaError
from fedelta.seeds import derive_seed
from fedelta.settings import Settings, quota


class RankSettings(Settings):
    """Ranks of the clients.

    Args:
        allocation: how they are given out.
        low, high: the two ranks; `uniform` uses `high`.
        share: share of clients that get the high rank.
        loss_on: whose rows the loss is measured on. `own`: a client reports that on its own held-out rows, on which
            those with the most one-sided data do best. `server`: the server measures it on its validation split.
        loss_rows: at most so many rows of the server's; None is all.
        per_client: with `fixed`, one rank for each client, in the order of their names.
    """

    allocation: Literal["uniform", "fixed", "random", "loss", "reversed-loss"] = "uniform"
    low: int = Field(default=4, ge=1)
    high: int = Field(default=16, ge=1)
    share: float = Field(default=0.1, ge=0, le=1)
    loss_on: Literal["own", "server"] = "own"
    loss_rows: int | None = Field(default=None, ge=1)
    per_client: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "RankSettings":
        if self.low > self.high and self.allocation != "uniform":
            raise ValueError(f"low rank {self.low} is above high rank {self.high}")
        if self.loss_rows is not None and self.loss_on != "server":
            raise ValueError(f"loss_rows goes with loss_on: server, found {self.loss_on}")
        if self.per_client is not None:
            if self.allocation != "fixed":
                raise ValueError(f"per_client goes with allocation: fixed, found {self.allocation}")
            if min(self.per_client, default=0) < 1:
                raise ValueError(f"every rank in per_client is at least 1, found {min(self.per_client, default=0)}")
        return self

    @property
    def largest(self) -> int:
        """R, the rank of the server's adapter."""
        return max(self.per_client) if self.per_client else self.high

    @property
    def by_loss(self) -> bool:
        """Whether clients are asked for the loss after their first training."""
        return self.allocation in ("loss", "reversed-loss")

    @property
    def mixed(self) -> bool:
        """Whether clients may come to have different ranks."""
        if self.per_client:
            return len(set(self.per_client)) > 1
        return self.allocation != "uniform" and self.low != self.high


def initial_ranks(clients: Sequence[str], settings: RankSettings, seed: int) -> dict[str, int]:
    """Rank of each client before round 0.

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
                f"ranks.per_client has {len(settings.per_client)} ranks, "
                f"expected one for each of {len(clients)} clients"
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
    """Ranks after a round in which some clients reported their first validation loss.

    The paper promotes the best share once all have reported. With partial participation first reports arrive
    over many rounds, from ever better global models, so losses of different rounds do not compare. We rank
    within the round's newcomers, who all started from the same model, and promote as many as keep the total
    at the share of all who have reported so far. Nobody is demoted.

    Args:
        ranks: before.
        first_losses: client → first reported loss, of all earlier rounds.
        newcomers: client → loss of those that report now for the first time.
    """
    if not settings.by_loss or not newcomers:
        return dict(ranks)
    promoted = sum(ranks[client] == settings.high for client in first_losses)
    places = max(0, quota(settings.share, len(first_losses) + len(newcomers)) - promoted)
    sign = -1 if settings.allocation == "reversed-loss" else 1
    best = sorted(newcomers, key=lambda client: (sign * newcomers[client], client))[:places]
    return {**ranks, **dict.fromkeys(best, settings.high)}
