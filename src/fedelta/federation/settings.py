"""Settings of a round: participation, weights, limits and precision."""

from typing import Literal

from pydantic import Field

from fedelta.errors import FedeltaError, quantity
from fedelta.protocol.compression import LOSSLESS, Precision
from fedelta.settings import Settings, quota


class FederationSettings(Settings):
    """The `federation` section: which clients take part in a round, and how their updates are weighted.

    Args:
        participation: share of the clients that are sampled each round, above 0 and at most 1. At least one client is
            sampled.
        sample: number of clients that are sampled each round; replaces `participation`.
        keep: number of updates that a round uses. Over Flower, the first `keep` usable updates are aggregated and the
            others are dropped. In process no client is late, so at most `keep` clients are sampled.
        dropout: probability that a sampled client is simulated to drop out after its download.
        weighting: weight p_i of a client's update. `examples`: proportional to its number of training rows, where a
            conversation is one row. `uniform`: equal. A list: one weight per client in the order of their names;
            clients of weight 0 are never sampled. Weights are normalized over the clients whose updates are used.
        on_bad_update: what happens to an update that can't be used. `skip`: the round continues without this client.
            `refuse`: the run stops.
        max_growth: an update can't be used if its adapter or its heads grew to more than this many times the norm that
            the client was sent, and to more than this many times the median growth of the other clients of the round.
        min_clients: minimum number of usable updates. A round with fewer is tried again with newly sampled clients.
        attempts: maximum number of attempts at a round. The run stops when the last one fails.
        precision: number format of adapters and heads in messages. Base patches are always float32. What compression
            leaves out of a client's update is added to its next update.
        deadline: maximum duration of a round over Flower, in seconds. The round then continues without the clients
            that have not replied.
        deviation: whether to measure in each round the error of averaging A and B separately. For a method that needs
            only means, this takes the memory of the clients' factors, or of a dense (m, n) sum per layer if that is
            less.
    """

    participation: float = Field(default=1.0, gt=0, le=1)
    sample: int | None = Field(default=None, ge=1)
    keep: int | None = Field(default=None, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    weighting: Literal["examples", "uniform"] | tuple[float, ...] = "examples"
    on_bad_update: Literal["skip", "refuse"] = "skip"
    max_growth: float = Field(default=100.0, gt=1)
    min_clients: int = Field(default=1, ge=1)
    attempts: int = Field(default=3, ge=1)
    precision: Precision = LOSSLESS
    deadline: float = Field(default=3600.0, gt=0)
    deviation: bool = True

    def round_size(self, clients: int) -> int:
        """Number of clients that are sampled for a round.

        Args:
            clients: number of clients that can be sampled.
        """
        if self.sample is not None:
            return min(self.sample, clients)
        return max(1, quota(self.participation, clients))

    def check(self, clients: int) -> None:
        """Raise if these settings don't fit the number of clients.

        Args:
            clients: number of clients in the federation.

        Raises:
            FedeltaError: if `sample`, `keep` or `min_clients` exceeds the clients of a round, or if `weighting` does
                not have one weight per client, has a negative weight, or has no positive one.
        """
        if (self.sample or 0) > clients:
            raise FedeltaError(
                f"federation.sample is {self.sample}, but the federation has {quantity(clients, 'client')}"
            )
        sampled, weights = self.round_size(clients), self.weighting
        if self.keep is not None and self.keep > sampled:
            raise FedeltaError(
                f"federation.keep is {self.keep}, but a round has {sampled} of {quantity(clients, 'client')}"
            )
        if self.min_clients > (used := self.keep or sampled):
            raise FedeltaError(
                f"federation.min_clients is {self.min_clients}, but a round has {used} of {quantity(clients, 'client')}"
            )
        if isinstance(weights, tuple):
            if len(weights) != clients:
                raise FedeltaError(
                    f"federation.weighting has {quantity(len(weights), 'weight')}, "
                    f"expected one for each of {quantity(clients, 'client')}"
                )
            if min(weights) < 0 or sum(weights) <= 0:
                raise FedeltaError(f"federation.weighting must be ≥ 0 with a positive sum, found {list(weights)}")
