"""What a person says about the rounds of a federation: who takes part, how updates are weighed, how long one waits."""

from typing import Literal

from pydantic import Field

from fedelta.errors import FedeltaError
from fedelta.protocol.compression import LOSSLESS, Precision
from fedelta.settings import Settings, quota


class FederationSettings(Settings):
    """Who takes part in a round and how updates are weighed.

    Args:
        participation: share of clients sampled each round.
        sample: how many are sampled, in the place of a share.
        keep: how many of their updates make the round: the first that come, the others are dropped. In process nobody
            is late, and so many are sampled.
        dropout: simulated probability that a sampled client vanishes after its download.
        weighting: p_i by number of examples, all equal, or one weight for each client in the order of names.
        on_bad_update: skip a client whose update can't be used, or stop the run.
        min_clients: a round with fewer usable updates than this is tried again with newly sampled clients.
        attempts: how often a round is tried before the run stops.
        precision: of the numbers in messages: adapters and heads; patches of the base are always float32. What rounding
            leaves out of a client's update is added to its next one.
        deadline: seconds of a round over Flower; then it goes on without those who have not answered.
        deviation: measure each round what averaging A and B apart would lose. For a method that needs means alone it
            costs the memory of the clients' factors, at most that of a dense sum a layer.
    """

    participation: float = Field(default=1.0, gt=0, le=1)
    sample: int | None = Field(default=None, ge=1)
    keep: int | None = Field(default=None, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    weighting: Literal["examples", "uniform"] | tuple[float, ...] = "examples"
    on_bad_update: Literal["skip", "refuse"] = "skip"
    min_clients: int = Field(default=1, ge=1)
    attempts: int = Field(default=3, ge=1)
    precision: Precision = LOSSLESS
    deadline: float = Field(default=3600.0, gt=0)
    deviation: bool = True

    def round_size(self, clients: int) -> int:
        """How many of so many clients are sampled for a round."""
        if self.sample is not None:
            return min(self.sample, clients)
        return max(1, quota(self.participation, clients))

    def check(self, clients: int) -> None:
        """Whether a federation of so many clients can be run like this.

        Raises:
            FedeltaError: if not.
        """
        if (self.sample or 0) > clients:
            raise FedeltaError(f"federation.sample is {self.sample}, but there are {clients} clients")
        sampled, weights = self.round_size(clients), self.weighting
        if self.keep is not None and self.keep > sampled:
            raise FedeltaError(f"federation.keep is {self.keep}, but a round has {sampled} of {clients} clients")
        if self.min_clients > (made_of := self.keep or sampled):
            raise FedeltaError(
                f"federation.min_clients is {self.min_clients}, but a round has {made_of} of {clients} clients"
            )
        if isinstance(weights, tuple):
            if len(weights) != clients:
                raise FedeltaError(
                    f"federation.weighting has {len(weights)} weights, expected one for each of {clients} clients"
                )
            if min(weights) < 0 or sum(weights) <= 0:
                raise FedeltaError(f"federation.weighting must be ≥ 0 with a positive sum, found {list(weights)}")
