"""What a method is: a few pure functions of state and contributions, and a statement of what it guarantees.

A method never sees clients' data, heads, the patch log or the wire. On the server it is given the global adapter and
what the round's clients trained, and returns the next adapter and what goes into the base. On a client it may add a
penalty to the loss and change what is sent. The server tells clients the method's name and options.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field
from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.lora.adapter import Adapter, Shapes, initial_adapter
from fedelta.lora.contribution import Contribution
from fedelta.lora.lowrank import LowRank
from fedelta.lora.rank_moments import Covariance, RankMoments
from fedelta.methods.server_optimizer import MOMENTS, ServerOptimizer
from fedelta.methods.state import MethodState, Patch
from fedelta.methods.transforms import Transform, move_by_optimizer, refresh, scale_patch, weigh_by_norm
from fedelta.protocol.messages import FactorPlan
from fedelta.seeds import derive_seed

Holds = Literal["never", "equal ranks", "always"]
"""Where a property holds. A method for equal ranks only says "always": it is never asked more."""
Options = Mapping[str, Any]


class Properties(NamedTuple):
    """What a method states, `fedelta methods` prints and the property suite checks.

    Args:
        exact: new global weight = old + Σ p_i × (what client i changed).
        no_op_invariant: if nobody trains, nothing changes, also over many rounds of truncated broadcasts.
        gauge_invariant: B→BG, A→G⁻¹A at a client does not change the new global weight.
        reduces_to_fedit: equal ranks give FedIT's factors, and no patch.
        identity: one client's update, alone in its round, comes back to it unchanged.
        linear: the factors are weighted sums of what clients send (what secure aggregation can compute).
    """

    exact: Holds = "never"
    no_op_invariant: Holds = "always"
    gauge_invariant: Holds = "never"
    reduces_to_fedit: Holds = "never"
    linear: bool = False
    identity: Holds = "always"


class ClientView(NamedTuple):
    """Whom a broadcast is for."""

    id: str
    rank: int


@dataclass(frozen=True, eq=False)
class ClientStart:
    """What one client is sent.

    Args:
        adapter: what it trains, at scale 1 and its rank.
        tail: module → what it adds to its base for this round only: the part of the global product that it can't hold.
        indices: which rank indices of the global adapter it trains; None is the first ones.
    """

    adapter: Adapter
    tail: Mapping[str, LowRank] = field(default_factory=dict)
    indices: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """One algorithm. Subclasses are dataclasses whose fields are the method's own options.

    Args:
        refresh: every so many rounds the global product goes into the base and the adapter starts afresh; 0 is never.
        residual_step: η, by which a patch of the base is multiplied.
        norm_weighting: weigh clients by ‖s_i B_i A_i‖_F of their whole adapter instead (HetLoRA, 2401.06432).
        server_optimizer: treat the change of the factors as a gradient (FedOpt, Reddi et al. 2003.00295).
        server_learning_rate, server_momentum: of that optimizer; the momentum is β₁.

    Class attributes:
        paper: citation.
        summary: one line for a person.
        properties: what the default options guarantee.
        mixed_ranks: whether clients may have different ranks.
        covariance: what `aggregate` needs besides means: nothing, the covariance of the factors, or that by rank index.
        keeps_basis: rank index j means the same direction in the next round, so that factors of two rounds can be
            subtracted; methods that factor anew (SVD) can't have a server optimizer.
        personal: whether every client has a model of its own, kept in part where nobody else sees it.
        remembers_clients: whether the state holds each client's last factors, so that memory grows with their number;
            else a step holds one client at a time.
        offline: why one step on adapter folders alone makes no sense; empty where it does.
        refused: options of every method that this one can't have, with the reason.
        variants: further options that the property suite must cover.
        aliases: other names under which papers state this rule, (name, paper).
    """

    refresh: Annotated[int, Field(ge=0)] = 0
    residual_step: Annotated[float, Field(ge=0, le=1)] = 1.0
    norm_weighting: bool = False
    server_optimizer: ServerOptimizer = "none"
    server_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    properties: ClassVar[Properties]
    mixed_ranks: ClassVar[bool] = True
    covariance: ClassVar[Covariance] = "none"
    keeps_basis: ClassVar[bool] = True
    personal: ClassVar[bool] = False
    remembers_clients: ClassVar[bool] = False
    offline: ClassVar[str] = ""
    refused: ClassVar[tuple[tuple[str, str], ...]] = ()
    variants: ClassVar[tuple[Options, ...]] = ()
    aliases: ClassVar[tuple[tuple[str, str], ...]] = ()

    def __post_init__(self) -> None:
        if self.server_optimizer != "none" and not self.keeps_basis:
            raise FedeltaError(
                f"method {self.name} can't have server_optimizer: it needs factors that mean the same in the next "
                "round, and this method factors anew"
            )
        for option, reason in self.refused:
            if getattr(self, option) != getattr(Method, option):
                raise FedeltaError(f"method {self.name} can't have {option}: {reason}")

    def holds(self) -> Properties:
        """What these options guarantee."""
        return self.properties

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, as a configuration or a message states them."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    @property
    def by_module(self) -> bool:
        """Whether a step on one module depends on no other module."""
        return not self.norm_weighting

    def start(self, shapes: Shapes, rank: int, seed: int) -> MethodState:
        """The state before round 0: A from the seed, B zero."""
        return MethodState(0, initial_adapter(shapes, rank, seed), seed)

    def factors(self, round: int) -> FactorPlan:  # noqa: ARG002  the schedule is the method's to use
        """Which factors cross in this round, which are trained, and which stay at the client."""
        return FactorPlan()

    def personalize(self, state: MethodState, client: ClientView) -> ClientStart:
        """What this client starts from; by default the first `rank` rank indices."""
        return ClientStart(state.adapter.truncate(client.rank))

    def penalty(self, start: Adapter, trained: Adapter) -> Tensor | None:  # noqa: ARG002
        """What a client adds to its loss, a function of the factors in training; None is nothing."""
        return None

    def finish(self, round: int, start: Adapter, trained: Adapter) -> Adapter:  # noqa: ARG002
        """What a client sends after training; its rank may be lower than it was."""
        return trained

    def fold(
        self,
        state: MethodState,
        contributions: Iterable[Contribution],
        measured: bool = False,
        ranks: frozenset[int] = frozenset(),
    ) -> RankMoments:
        """The first half of a step: what the clients trained, folded into sums one client at a time.

        Args:
            state: as broadcast in this round.
            contributions: consumed once; each is folded in and dropped.
            measured: keep what the deviation is read from, even if the method does not need it.
            ranks: the ranks that clients may have; empty if that is not known.
        """
        if self.norm_weighting:
            contributions = weigh_by_norm(contributions)
        kind = "total" if measured and self.covariance == "none" else self.covariance
        return RankMoments(state.adapter, contributions, kind, ranks)

    @abstractmethod
    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        """The method's own equation, without the options that every method has.

        Args:
            state: as broadcast in this round.
            moments: of the clients' factors, by rank index.

        Returns:
            The state with the next adapter (scale 1), and the patch of the base, empty when there is none.
        """

    def step(
        self, state: MethodState, contributions: Iterable[Contribution], ranks: frozenset[int] = frozenset()
    ) -> tuple[MethodState, Patch]:
        """One server step: the state of the next round and the patch of the base."""
        return self.conclude(state, self.fold(state, contributions, ranks=ranks))

    def transforms(self) -> list[Transform]:
        """What follows `aggregate` in a step, in order."""
        chain: list[Transform] = []
        if self.residual_step != 1:
            chain.append(scale_patch(self.residual_step))
        if self.server_optimizer != "none":
            chain.append(move_by_optimizer(self.server_optimizer, self.server_learning_rate, self.server_momentum))
        if self.refresh:
            chain.append(refresh(self.refresh, self.restart))
        return chain

    def conclude(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        """The second half of a step: `aggregate`, then the transforms, and the number of the next round."""
        after, patch = self.aggregate(state, moments)
        for transform in self.transforms():
            after, patch = transform(state, after, patch)
        return replace(after, round=state.round + 1), patch

    def restart(self, state: MethodState) -> MethodState:
        """The adapter as at the start, from another seed: its product is zero."""
        seed = derive_seed(state.seed, "restart")
        fresh = self.start(state.adapter.shapes, state.adapter.rank, seed)
        first = next(iter(state.adapter.values()))
        adapter = fresh.adapter.to(first.B.dtype)
        # Moments of the optimizer are of directions that are gone.
        kept = {key: tensor for key, tensor in state.memory.items() if not key.startswith(f"{MOMENTS}/")}
        return replace(state, adapter=adapter, seed=seed, memory={**kept, **fresh.memory})
