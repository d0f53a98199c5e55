"""The server: an explicit state, and one `step` that turns a round's replies into the next state.

The server never needs the base model. It knows the shapes of the adapted layers, the global adapter, the heads and
the log of base patches.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from fedelta.errors import FedeltaError, TooFewUpdates, one_line, quantity
from fedelta.federation.ranks import RankSettings, initial_ranks, promote
from fedelta.federation.settings import FederationSettings
from fedelta.federation.update_collector import ClientReply, UpdateCollector
from fedelta.lora.adapter import Adapter, ScaleRule, Shapes, lora_scale
from fedelta.lora.contribution import Norms
from fedelta.lora.deviation import Deviation, deviation
from fedelta.lora.patch_log import PatchLog
from fedelta.methods.exactness import lost_in_step
from fedelta.methods.method import ClientView, Method, MethodState
from fedelta.protocol.compression import LOSSLESS
from fedelta.protocol.factor_plan import select_factors
from fedelta.protocol.messages import Broadcast
from fedelta.seeds import derive_seed


@dataclass(frozen=True, eq=False)
class ServerState:
    """The server's complete state between two rounds. A checkpoint saves every field.

    Args:
        method: the round, the global adapter at rank R (scale 1) and the method's memory.
        heads: name → tensor of the trained modules outside LoRA.
        classes: label of each output of the model.
        log: the base patches so far.
        ranks: client → rank.
        versions: client → base version that it is known to have.
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
        """Number of finished rounds, which is the index of the next round."""
        return self.method.round


@dataclass(frozen=True, eq=False)
class RoundOutcome:
    """Facts about one `Server.step`.

    Args:
        contributors: clients whose updates were aggregated.
        shares: contributor → its share p_i of the mean.
        norms: contributor → norms of the adapter and the heads that it sent.
        skipped: client → why its update was not aggregated.
        promoted: clients that got a higher rank.
        pruned: clients that chose a lower rank.
        train_loss: mean training loss of the contributors by weight; None if none reported it.
        deviation: module → deviation of the mean factors from the mean of products; empty if not measured.
        lost: module → what the step lost of the mean product, as `lost_in_step`; empty if not measured.
        patch_width: largest width of the round's base patch; 0 without a patch.
        energy: energy of the new global adapter by rank index, see `Adapter.energy_by_rank`.
    """

    contributors: list[str]
    shares: dict[str, float]
    norms: dict[str, Norms]
    skipped: dict[str, str]
    promoted: list[str]
    pruned: list[str]
    train_loss: float | None
    deviation: dict[str, Deviation]
    lost: dict[str, float]
    patch_width: int
    energy: list[float]


class Server:
    """Samples clients, writes their broadcasts and turns their updates into the next state.

    A server holds the rules of a run and no state: every method takes a `ServerState`, and `step` returns a new one.
    All random choices depend only on the seed, the round and the attempt.

    Args:
        method: the aggregation method.
        settings: sampling, weighting and limits of a round.
        ranks: which client gets which rank.
        alpha: LoRA's α.
        rule: how α and a client's rank r give its scale: α/r, α/√r, or α at every rank.
        seed: the run's seed.

    Raises:
        FedeltaError: if the method does not support the ranks: mixed ranks under a method that needs equal ones, or
            ranks by the loss on the server's rows under a method whose clients keep factors.
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
                f"between {ranks.low} and {ranks.largest}; use a method that takes mixed ranks (see `fedelta methods`)"
            )
        if method.personal and ranks.by_loss and ranks.loss_on == "server":
            raise FedeltaError(
                f"method {method.name} keeps factors at clients, so the server can't measure their losses; "
                f"expected ranks.loss_on: own, found {ranks.loss_on}"
            )
        self.method = method
        self.settings = settings
        self.ranks = ranks
        self.alpha = alpha
        self.rule = rule
        self.seed = seed

    def scale(self, rank: int) -> float:
        """Scale s of a client of this rank."""
        return lora_scale(self.alpha, rank, self.rule)

    def start(
        self, shapes: Shapes, heads: Mapping[str, Tensor], clients: Iterable[str], classes: Iterable[str]
    ) -> ServerState:
        """Create the state before round 0.

        B is zero, so the global model is the base model with its initial heads.

        Args:
            shapes: module → (m, n) of the adapted layers.
            heads: name → initial tensor of the trained modules outside LoRA.
            clients: names of all clients.
            classes: label of each output of the model.

        Raises:
            FedeltaError: if the settings or the ranks don't fit the number of clients.
        """
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
        """Draw the clients of this round without replacement. They are returned in the order of their names.

        Args:
            state: the state before the round.
            attempt: number of earlier attempts at this round.
            spare: whether to draw all clients of `round_size`, even if the round keeps only the first `keep` updates.
        """
        # The update of a client with weight 0 would change nothing.
        clients = [client for client, weight in self._weights(state).items() if weight != 0]
        size = self.settings.round_size(len(clients))
        if self.settings.keep is not None and not spare:
            size = min(size, self.settings.keep)
        rng = np.random.default_rng(derive_seed(self.seed, "sample", state.round, *self._attempt_key(attempt)))
        return [clients[i] for i in sorted(rng.choice(len(clients), size, replace=False))]

    @staticmethod
    def _attempt_key(attempt: int) -> tuple[int, ...]:
        return (attempt,) if attempt else ()

    def drops_out(self, state: ServerState, client: str, attempt: int = 0) -> bool:
        """Whether this client is simulated to drop out in this attempt at the round."""
        seed = derive_seed(self.seed, "dropout", state.round, client, *self._attempt_key(attempt))
        return bool(np.random.default_rng(seed).random() < self.settings.dropout)

    def broadcast(self, state: ServerState, client: str, since: int | None = None) -> Broadcast:
        """Write the client's message: its adapter at its rank and scale, the heads, and the base patches it lacks.

        Args:
            state: the state before the round.
            client: the client's name.
            since: base version that the client has; None takes the version recorded in the state.
        """
        rank = state.ranks[client]
        scale = self.scale(rank)
        client_start = self.method.personalize(state.method, ClientView(client, rank))
        plan, seed = self.method.factors(state.round), state.method.seed
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
            wants_validation=self.ranks.loss_on == "own" and self.needs_first_loss(state, client),
            precision=self.settings.precision,
        )
        return message if message.precision == LOSSLESS else message.as_received()

    def needs_first_loss(self, state: ServerState, client: str) -> bool:
        """Whether the client's loss after this round's training decides its rank."""
        return self.ranks.by_loss and client not in state.first_losses

    def personal_adapters(self, state: ServerState, kept: Mapping[str, Adapter]) -> dict[str, Adapter]:
        """Compute the adapter that each client would start the next round from.

        Args:
            state: the state between two rounds.
            kept: client → the adapter that it keeps, see `Trainer.kept`.

        Returns:
            Client → adapter with the common factors of the state and the client's own factors.
        """
        return {
            client: self.broadcast(state, client).adapter(state.log.shapes, kept.get(client))
            for client in sorted(state.ranks)
        }

    def step(self, state: ServerState, replies: Iterable[ClientReply]) -> tuple[ServerState, RoundOutcome]:
        """Finish one round: check the replies, aggregate the updates, append the base patch and promote clients.

        Args:
            state: the state that the broadcasts were written from.
            replies: the clients' replies, consumed one at a time. Each update is added to running sums and then
                dropped, so memory does not grow with the number of clients. Floating-point sums depend on their order.

        Raises:
            TooFewUpdates: if fewer than `min_clients` updates can be used.
            BadUpdate: on the first bad update if `on_bad_update` is "refuse".
        """
        refuse = self.settings.on_bad_update == "refuse"
        weights, max_growth = self._weights(state), self.settings.max_growth
        updates = UpdateCollector(replies, state.log.shapes, weights, state.heads, refuse, max_growth)
        # If clients keep B, the server has no product to measure.
        measured = self.settings.deviation and not self.method.personal
        moments = self.method.fold(state.method, updates.contributions(), measured, frozenset(state.ranks.values()))
        self._check_usable(state, updates)
        method, patch = self.method.conclude(state.method, moments)
        ranks = promote({**state.ranks, **updates.pruned}, state.first_losses, updates.losses, self.ranks)
        outcome = RoundOutcome(
            contributors=updates.contributors,
            shares=updates.shares(),
            norms=updates.norms,
            skipped=updates.skipped,
            promoted=sorted(client for client in ranks if ranks[client] > state.ranks[client]),
            pruned=sorted(updates.pruned),
            train_loss=updates.mean_loss(),
            deviation=deviation(moments) if measured else {},
            lost=lost_in_step(self.method, state.method, moments, method, patch) if measured else {},
            patch_width=max((product.width for product in patch.values()), default=0),
            energy=method.adapter.energy_by_rank().tolist(),
        )
        # A failed client may or may not have folded its patches. It keeps its old version here and is sent them again;
        # it skips those that it already has.
        return ServerState(
            method=method,
            heads=updates.mean_heads(),
            classes=state.classes,
            log=state.log.append(patch),
            ranks=ranks,
            versions={**state.versions, **updates.versions},
            first_losses={**state.first_losses, **updates.losses},
        ), outcome

    def _check_usable(self, state: ServerState, updates: UpdateCollector) -> None:
        usable = len(updates.contributors)
        if usable < self.settings.min_clients:
            reasons = "; ".join(f"{c}: {one_line(reason, 90)}" for c, reason in list(updates.skipped.items())[:2])
            raise TooFewUpdates(
                f"round {state.round}: {quantity(usable, 'usable update')}, "
                f"expected at least {self.settings.min_clients} ({reasons})",
                dict(updates.skipped),
                diverged=bool(updates.skipped) and updates.diverged == set(updates.skipped),
            )

    def _weights(self, state: ServerState) -> dict[str, float | None]:
        """Map each client, in the order of names, to its weight w_i; None stands for its number of examples."""
        weighting, clients = self.settings.weighting, sorted(state.ranks)
        if isinstance(weighting, tuple):
            return dict(zip(clients, weighting, strict=True))
        return dict.fromkeys(clients, None if weighting == "examples" else 1.0)
