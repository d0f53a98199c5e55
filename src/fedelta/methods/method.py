"""`Method`: the base class of all methods, a few pure functions of state and contributions with stated properties.

A method never sees the clients' data, the heads, the patch log or the messages. On the server, it receives the global
adapter and the clients' trained factors and returns the next adapter and the patch of the base. On a client, it may add
a penalty to the loss and change the factors before they are sent. A broadcast contains the method's name and options.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, Field
from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.lora.adapter import Adapter, Shapes, initial_adapter
from fedelta.lora.contribution import Contribution
from fedelta.lora.lowrank import LowRank, Product, add
from fedelta.lora.patch_log import Patch
from fedelta.lora.rank_moments import Covariance, Padding, RankMoments
from fedelta.methods.server_optimizer import MOMENTS, ServerOptimizer
from fedelta.methods.state import MethodState
from fedelta.methods.transforms import Transform, move_by_optimizer, refresh, scale_patch, weight_by_norm
from fedelta.protocol.factor_plan import FactorPlan
from fedelta.seeds import derive_seed
from fedelta.settings import MAX_COUNT

Holds = Literal["never", "equal ranks", "always"]
"""Ranks for which a property holds. A method that only takes equal ranks states "always" if it holds for those."""
Options = Mapping[str, Any]
"""Option name → value."""


class Properties(NamedTuple):
    """Properties that a method states. `fedelta methods` prints them, and the property suite checks them.

    Args:
        exact: new global weight = old + Σ p_i × (change of client i).
        no_op_invariant: if no client trains, nothing changes, even over many rounds of truncated broadcasts.
        gauge_invariant: B→BG, A→G⁻¹A at a client does not change the new global weight.
        reduces_to_fedit: with equal ranks, the factors are FedIT's and there is no patch.
        linear: the factors are weighted sums of the clients' factors, as secure aggregation can compute them.
        identity: a client that is alone in a round receives its own update back unchanged.
    """

    exact: Holds = "never"
    no_op_invariant: Holds = "always"
    gauge_invariant: Holds = "never"
    reduces_to_fedit: Holds = "never"
    linear: bool = False
    identity: Holds = "always"


class ClientView(NamedTuple):
    """Client that a broadcast is made for: its id and rank."""

    id: str
    rank: int


@dataclass(frozen=True, eq=False)
class ClientStart:
    """Starting point of one client in a round.

    Args:
        adapter: adapter that the client trains, at scale 1 and at its rank.
        tail: module → matrix (m, n) that the client adds to its base for this round only: the part of the global
            product that exceeds its rank.
        indices: rank indices of the global adapter that the client trains, (r_i,); None means the first r_i.
    """

    adapter: Adapter
    tail: Mapping[str, LowRank] = field(default_factory=dict)
    indices: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base class of all methods. Subclasses are dataclasses whose fields are the method's own options.

    Args:
        refresh: number of rounds after which the global product is moved into the base and the adapter restarts;
            0 never refreshes.
        residual_step: η, the factor of every patch of the base, in [0, 1].
        norm_weighting: weight clients by ‖s_i B_i A_i‖_F of their whole adapter (HetLoRA, 2401.06432).
        server_optimizer: optimizer that uses the change of the factors as a gradient (FedOpt, Reddi et al. 2003.00295).
        server_learning_rate: η of the server optimizer.
        server_momentum: β₁ of the server optimizer, in [0, 1).

    Class attributes:
        name: name in the registry.
        paper: citation.
        summary: description in one line.
        properties: properties that hold with the default options.
        missing: what stands in for a rank index that a client lacks, in the mean that the method approximates: the mean
            of its contributors, zeros, or its unchanged value.
        mixed_ranks: True if clients may have different ranks.
        covariance: moments that `aggregate` needs besides means: "none", "total" for the covariance of the factors, or
            "by rank" for the covariance of each rank index.
        keeps_basis: True if rank index j stays the same direction in the next round, so that factors of two rounds can
            be subtracted. Methods that refactor (SVD) do not keep it and can't have a server optimizer.
        personal: True if every client has its own model and keeps a part of it to itself.
        remembers_clients: True if the state stores each client's last factors, so that memory grows with the number of
            clients. Otherwise a step holds one client at a time.
        offline: reason why a single step on adapter folders is not meaningful; empty if it is.
        refused: options of the base class that this method can't have, (option, reason).
        variants: further options that the property suite must cover.
        aliases: other names of the same rule, (name, paper).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False)

    refresh: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    residual_step: Annotated[float, Field(ge=0, le=1)] = 1.0
    norm_weighting: bool = False
    server_optimizer: ServerOptimizer = "none"
    server_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    properties: ClassVar[Properties]
    missing: ClassVar[Padding] = "contributors"
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
                f"method {self.name} can't have server_optimizer: it needs factors that keep their basis from round to "
                "round, and this method refactors"
            )
        for option, reason in self.refused:
            if getattr(self, option) != getattr(Method, option):
                raise FedeltaError(f"method {self.name} can't have {option}: {reason}")

    def holds(self) -> Properties:
        """Return the properties that hold with these options."""
        return self.properties

    @property
    def options(self) -> dict[str, Any]:
        """Options that differ from their defaults, as in a configuration or a message."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    @property
    def by_module(self) -> bool:
        """True if the step of a module does not depend on other modules."""
        return not self.norm_weighting

    def start(self, shapes: Shapes, rank: int, seed: int) -> MethodState:
        """Return the state before round 0, with A drawn from the seed and B zero.

        Args:
            shapes: module → (m, n) of the adapted layers.
            rank: R.
            seed: seed of the draw.
        """
        return MethodState(0, initial_adapter(shapes, rank, seed), seed)

    def factors(self, round: int) -> FactorPlan:  # noqa: ARG002  subclasses may alternate by round
        """Return which factors are sent, trained, sent back and kept in this round."""
        return FactorPlan()

    def personalize(self, state: MethodState, client: ClientView) -> ClientStart:
        """Return the starting point of a client; by default the first r_i rank indices."""
        return ClientStart(state.adapter.truncate(client.rank))

    def penalty(self, start: Adapter, trained: Adapter) -> Tensor | None:  # noqa: ARG002
        """Return a scalar that a client adds to its loss, or None.

        Args:
            start: adapter that the client received.
            trained: adapter in training, with gradients.
        """
        return None

    def finish(self, round: int, start: Adapter, trained: Adapter) -> Adapter:  # noqa: ARG002
        """Return the adapter that a client sends after training. Its rank may be lower than before.

        Args:
            round: number of the round, from 0.
            start: adapter that the client received.
            trained: adapter after training.
        """
        return trained

    def fold(
        self,
        state: MethodState,
        contributions: Iterable[Contribution],
        measured: bool = False,
        ranks: frozenset[int] = frozenset(),
    ) -> RankMoments:
        """Compute the moments of a round, the first half of a step, one client at a time.

        Args:
            state: state as broadcast in this round.
            contributions: iterated once; each contribution is added to the sums and dropped.
            measured: keep the covariance for `deviation`, even if the method does not need it.
            ranks: ranks that clients may have; empty if they are not known.
        """
        if self.norm_weighting:
            contributions = weight_by_norm(contributions)
        kind = "total" if measured and self.covariance == "none" else self.covariance
        return RankMoments(state.adapter, contributions, kind, ranks)

    @abstractmethod
    def aggregate(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        """Apply the method's equation, without the options of the base class.

        Args:
            state: state as broadcast in this round.
            moments: moments of the clients' factors by rank index.

        Returns:
            The state with the next adapter (scale 1), and the patch of the base, which may be empty.
        """

    def exact_mean(self, state: MethodState, moments: RankMoments, module: str) -> Product | None:  # noqa: ARG002
        """Return the mean of the clients' products that `aggregate` approximates, (m, n), at scale 1.

        By default, `missing` stands in for a rank index that a client lacks. None if the method does not approximate
        a mean.

        Args:
            state: state as broadcast in this round.
            moments: moments of the round, kept with a covariance.
            module: name of the adapted layer.
        """
        if self.missing == "zeros":
            return moments.mean_product(module)
        mean = moments.mean(module, self.missing)
        return add([LowRank(mean.B, mean.A), moments.covariance(module)])

    def step(
        self, state: MethodState, contributions: Iterable[Contribution], ranks: frozenset[int] = frozenset()
    ) -> tuple[MethodState, Patch]:
        """Run one server step.

        Args:
            state: state as broadcast in this round.
            contributions: iterated once.
            ranks: ranks that clients may have; empty if they are not known.

        Returns:
            The state of the next round, and the patch of the base, which may be empty.
        """
        return self.conclude(state, self.fold(state, contributions, ranks=ranks))

    def transforms(self) -> list[Transform]:
        """Return the transforms that follow `aggregate` in a step, in order."""
        chain: list[Transform] = []
        if self.residual_step != 1:
            chain.append(scale_patch(self.residual_step))
        if self.server_optimizer != "none":
            chain.append(move_by_optimizer(self.server_optimizer, self.server_learning_rate, self.server_momentum))
        if self.refresh:
            chain.append(refresh(self.refresh, self.restart))
        return chain

    def conclude(self, state: MethodState, moments: RankMoments) -> tuple[MethodState, Patch]:
        """Run the second half of a step: `aggregate`, the transforms, and the number of the next round."""
        after, patch = self.aggregate(state, moments)
        for transform in self.transforms():
            after, patch = transform(state, after, patch)
        return replace(after, round=state.round + 1), patch

    def restart(self, state: MethodState) -> MethodState:
        """Return the state with a fresh adapter from a new seed. The product of the adapter is zero."""
        seed = derive_seed(state.seed, "restart")
        fresh = self.start(state.adapter.shapes, state.adapter.rank, seed)
        first = next(iter(state.adapter.values()))
        adapter = fresh.adapter.to(first.B.dtype)
        # The optimizer's moments belong to the old directions and are dropped.
        memory = {key: tensor for key, tensor in state.memory.items() if not key.startswith(f"{MOMENTS}/")}
        return replace(state, adapter=adapter, seed=seed, memory={**memory, **fresh.memory})
