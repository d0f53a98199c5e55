"""The server: an explicit state, and one `step` that turns a round's replies into the next state.

The server never needs the base model: it knows the shapes of the adapted layers, the global adapter, the
heads, and the log of base patches.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedelta.errors import Diverged, FedeltaError, TooFewUpdates, quantity
from fedelta.federation.ranks import RankSettings, initial_ranks, promote
from fedelta.federation.settings import FederationSettings
from fedelta.federation.update_collector import ClientReply, UpdateCollector
from fedelta.lora.adapter import Adapter, ScaleRule, Shapes, lora_scale
from fedelta.lora.deviation import Deviation, deviation
from fedelta.lora.patch_log import PatchLog
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods.method import ClientView, Method, MethodState
from fedelta.protocol.compression import LOSSLESS
from fedelta.protocol.messages import Broadcast, select_factors
from fedelta.seeds import derive_seed


@dataclass(frozen=True, eq=False)
class ServerState:
    """Everything that a run is, between two rounds; the checkpoint is exactly this.

    Args:
        method: round, global adapter at rank R (scale 1), the method's memory.
        heads: name → tensor, the trained modules outside LoRA.
        classes: label of each of the model's outputs.
        log: base patches.
        ranks: client → rank.
        versions: client → base version that it is known to hold.
        first_losses: client → validation loss after its first local training.
    """

    method: MethodState
    heads: Mapping[str, Tensor]
    classes: tuple[str, ...]
    log: PatchLog
    ranks: Mapping[str, int]
    versions: Mapping[str, int]
    first_losses: Mapping[str, float] = field(default_factory=dict)

    @property
    def round(self) -> int:
        """Number of finished rounds, and the index of the next."""
        return self.method.round


@dataclass(frozen=True, eq=False)
class RoundOutcome:
    """What a step has to report.

    Args:
        contributors: clients whose updates were averaged.
        skipped: client → why its update was not.
        promoted: clients that got a higher rank.
        pruned: clients that took a lower one.
        train_loss: mean over contributors by weight, None if none reported it.
        deviation: module → deviation of the mean factors from the mean of products; empty if not measured.
        patch_width: largest width of the round's base patch, 0 without one.
        energy: of the new global adapter by rank index, see `Adapter.energy_by_rank`.
    """

    contributors: list[str]
    skipped: dict[str, str]
    promoted: list[str]
    pruned: list[str]
    train_loss: float | None
    deviation: dict[str, Deviation]
    patch_width: int
    energy: list[float]


class Server:
    """The rules of a run; holds no state.

    Args:
        method: how updates are aggregated.
        settings: sampling and weighting.
        ranks: which client gets which rank.
        alpha, rule: LoRA's α and how it becomes the scale of each rank.
        seed: of the run.
    """

    def __init__(
        self,
        method: Method,
        settings: FederationSettings,
        ranks: RankSettings,
        alpha: float,
        rule: ScaleRule,
        seed: int,
    ) -> None:
        if ranks.mixed and not method.mixed_ranks:
            raise FedeltaError(
                f"method {method.name} needs equal ranks, but ranks are allocated {ranks.allocation!r} "
                f"between {ranks.low} and {ranks.largest}; use one that takes mixed ranks (see `fedelta methods`)"
            )
        if method.personal and ranks.by_loss and ranks.loss_on == "server":
            raise FedeltaError(f"method {method.name} keeps factors at clients; ranks.loss_on: server can't judge them")
        self.method = method
        self.settings = settings
        self.ranks = ranks
        self.alpha = alpha
        self.rule = rule
        self.seed = seed

    def scale(self, rank: int) -> float:
        """s of a client of this rank."""
        return lora_scale(self.alpha, rank, self.rule)

    def start(
        self, shapes: Shapes, heads: Mapping[str, Tensor], clients: Iterable[str], classes: Iterable[str]
    ) -> ServerState:
        """The state before round 0: B is zero, so the global model is the base model with its initial heads."""
        clients = sorted(clients)
        self.settings.check(len(clients))
        return ServerState(
            method=self.method.start(shapes, self.ranks.largest, derive_seed(self.seed, "adapter")),
            heads=dict(heads),
            classes=tuple(classes),
            log=PatchLog(dict(shapes)),
            ranks=initial_ranks(clients, self.ranks, self.seed),
            versions=dict.fromkeys(clients, 0),
        )

    def sample(self, state: ServerState, attempt: int = 0, spare: bool = False) -> list[str]:
        """The clients of this round, drawn without replacement, in the order of their names.

        Args:
            attempt: how often this round has been tried before.
            spare: whether to draw more than the round keeps, where it keeps the first that come.
        """
        # A client of weight 0 would train for nothing.
        clients = [client for client, weight in self._weights(state).items() if weight != 0]
        size = self.settings.round_size(len(clients))
        if self.settings.keep is not None and not spare:
            size = min(size, self.settings.keep)
        rng = np.random.default_rng(derive_seed(self.seed, "sample", state.round, *self._again(attempt)))
        return [clients[i] for i in sorted(rng.choice(len(clients), size, replace=False))]

    @staticmethod
    def _again(attempt: int) -> tuple[int, ...]:
        return (attempt,) if attempt else ()

    def drops_out(self, state: ServerState, client: str, attempt: int = 0) -> bool:
        """Whether this client is simulated to vanish in this attempt at the round."""
        rng = np.random.default_rng(derive_seed(self.seed, "dropout", state.round, client, *self._again(attempt)))
        return bool(rng.random() < self.settings.dropout)

    def broadcast(self, state: ServerState, client: str, since: int | None = None) -> Broadcast:
        """What this client is sent: the adapter at its rank and scale, and what its base has not seen.

        Args:
            since: the version of its base; None is the one that it is known to hold.
        """
        rank = state.ranks[client]
        scale = self.scale(rank)
        client_start = self.method.personalize(state.method, ClientView(client, rank))
        plan, seed = self.method.factors(state.round), state.method.seed
        precision = self.settings.precision
        message = Broadcast(
            client=client,
            round=state.round,
            rank=rank,
            scale=scale,
            method={"name": self.method.name, "options": self.method.options},
            plan=plan,
            factors=select_factors(client_start.adapter.with_scale(scale), plan.down, seed),
            seed=seed,
            tail=client_start.tail,
            indices=None if client_start.indices is None else tuple(client_start.indices.tolist()),
            heads=state.heads,
            patch=state.log.since(state.versions[client] if since is None else since),
            wants_validation=self.ranks.loss_on == "own" and self.to_be_judged(state, client),
            precision=precision,
        )
        return message if precision == LOSSLESS else message.as_received()

    def to_be_judged(self, state: ServerState, client: str) -> bool:
        """Whether the loss after its training in this round decides about its rank."""
        return self.ranks.by_loss and client not in state.first_losses

    def personal_adapters(self, state: ServerState, kept: Mapping[str, Adapter]) -> dict[str, Adapter]:
        """Client → the adapter that it would go on from: the common factors, and those it keeps."""
        return {
            client: self.broadcast(state, client).adapter(state.log.shapes, kept.get(client))
            for client in sorted(state.ranks)
        }

    def step(self, state: ServerState, replies: Iterable[ClientReply]) -> tuple[ServerState, RoundOutcome]:
        """One round: check the replies, aggregate, append the patch, allocate ranks.

        Args:
            state: as broadcast.
            replies: consumed one at a time; an update is folded in and dropped, so memory does not grow with the
                number of clients. Their order matters to rounding.

        Raises:
            TooFewUpdates: if fewer than `min_clients` updates can be used.
            FedeltaError: on the first bad one if the setting says refuse, or a mean that is not finite.
        """
        refuse = self.settings.on_bad_update == "refuse"
        updates = UpdateCollector(replies, state.log.shapes, self._weights(state), state.heads, refuse)
        # Where clients keep B there is no product on the server to measure.
        measured = self.settings.deviation and not self.method.personal
        moments = self.method.fold(state.method, updates.contributions(), measured, frozenset(state.ranks.values()))
        self._check_usable(state, updates, moments)
        method, patch = self.method.conclude(state.method, moments)
        ranks = promote({**state.ranks, **updates.pruned}, state.first_losses, updates.losses, self.ranks)
        outcome = RoundOutcome(
            contributors=updates.contributors,
            skipped=updates.skipped,
            promoted=sorted(client for client in ranks if ranks[client] > state.ranks[client]),
            pruned=sorted(updates.pruned),
            train_loss=updates.mean_loss(),
            deviation=deviation(moments) if measured else {},
            patch_width=max((product.width for product in patch.values()), default=0),
            energy=method.adapter.energy_by_rank().tolist(),
        )
        # A client that failed may or may not have folded what it was sent; it skips what it already has.
        return ServerState(
            method=method,
            heads=updates.mean_heads(),
            classes=state.classes,
            log=state.log.append(patch),
            ranks=ranks,
            versions={**state.versions, **updates.versions},
            first_losses={**state.first_losses, **updates.losses},
        ), outcome

    def _check_usable(self, state: ServerState, updates: UpdateCollector, moments: RankMoments) -> None:
        usable = len(updates.contributors)
        if usable < self.settings.min_clients:
            reasons = "; ".join(f"{client}: {reason[:200]}" for client, reason in list(updates.skipped.items())[:3])
            raise TooFewUpdates(
                f"round {state.round}: {quantity(usable, 'usable update')}, "
                f"expected at least {self.settings.min_clients} ({reasons})",
                dict(updates.skipped),
                diverged=bool(updates.skipped) and updates.diverged == set(updates.skipped),
            )
        for module, pair in moments.means().items():
            # A product of factors as large as this may overflow where the factors themselves do not.
            if not float(pair.A.abs().max()) * float(pair.B.abs().max()) < torch.finfo(pair.B.dtype).max:
                raise Diverged(f"round {state.round}: the mean of module {module} is not finite; updates are too large")

    def _weights(self, state: ServerState) -> dict[str, float | None]:
        """w_i of each client, in the order of names; None is its number of examples."""
        weighting, clients = self.settings.weighting, sorted(state.ranks)
        if isinstance(weighting, tuple):
            return dict(zip(clients, weighting, strict=True))
        return dict.fromkeys(clients, None if weighting == "examples" else 1.0)
