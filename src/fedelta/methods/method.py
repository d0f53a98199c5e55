"""What a method is: a few pure functions of state and contributions.

A method never sees clients' data, heads, the patch log or the wire. It is given the global adapter and what
the round's clients trained, and returns the next adapter and what goes into the base.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from fedelta.adapter import Adapter, Shapes, initial_adapter
from fedelta.contribution import Contribution
from fedelta.lowrank import LowRank

Holds = Literal["never", "equal ranks", "always"]
"""Where a property holds. A method for equal ranks only says "always": it is never asked more."""


@dataclass(frozen=True, eq=False)
class MethodState:
    """What a method carries from round to round.

    Args:
        round: counted from 0.
        adapter: the global adapter at rank R, scale 1 (every s is absorbed into B).
        memory: whatever tensors the method keeps for itself, name → tensor.
    """

    round: int
    adapter: Adapter
    memory: Mapping[str, Tensor] = field(default_factory=dict)


class Tailored(NamedTuple):
    """What one client is sent: an adapter at scale 1, and the seed to draw A from when A need not be sent."""

    adapter: Adapter
    seed_A: int | None = None


class Method(ABC):
    """One algorithm. Subclasses are dataclasses whose fields are the method's options.

    Class attributes, all printed by `fedelta methods` and checked by the property suite:
        paper: citation.
        summary: one line for a person.
        mixed_ranks: whether clients may have different ranks.
        exact: new global weight = old + Σ p_i × (what client i changed).
        no_op_invariant: if nobody trains, nothing changes, also over many rounds of truncated broadcasts.
        gauge_invariant: B→BG, A→G⁻¹A at a client does not change the new global weight.
        reduces_to_fedit: equal ranks give FedIT's factors, and no patch.
        linear: the factors are weighted sums of what clients send (what secure aggregation can compute).
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    mixed_ranks: ClassVar[bool]
    exact: ClassVar[Holds]
    no_op_invariant: ClassVar[Holds]
    gauge_invariant: ClassVar[Holds]
    reduces_to_fedit: ClassVar[Holds]
    linear: ClassVar[bool]

    def start(self, shapes: Shapes, rank: int, seed: int) -> MethodState:
        """The state before round 0: A from the seed, B zero."""
        return MethodState(0, initial_adapter(shapes, rank, seed))

    def trainable(self, round: int) -> frozenset[str]:  # noqa: ARG002  the schedule is the method's to use
        """Which factors a client trains in this round, out of "A" and "B"."""
        return frozenset({"A", "B"})

    def tailor(self, state: MethodState, rank: int) -> Tailored:
        """What a client of this rank starts from; by default the first `rank` rank indices."""
        return Tailored(state.adapter.truncate(rank))

    def absent(self, before: MethodState, after: MethodState) -> Adapter | None:  # noqa: ARG002
        """What stands in for the rank indices that a client does not hold; None is zeros.

        By default the returned factors: absent clients count as the mean of those that are there.
        """
        return after.adapter

    @abstractmethod
    def aggregate(
        self, state: MethodState, contributions: Iterable[Contribution]
    ) -> tuple[MethodState, dict[str, LowRank]]:
        """One server step.

        Args:
            state: as broadcast in this round.
            contributions: what the clients trained; may be consumed once, in any order.

        Returns:
            The state of the next round (scale 1) and the patch of the base, empty when there is none.
        """
