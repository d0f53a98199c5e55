"""The server: an explicit state, and one `step` that turns a round's replies into the next state.

The server never needs the base model: it knows the shapes of the adapted layers, the global adapter, the
heads, and the log of base patches.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedelta.adapter import ScaleRule, Shapes, lora_scale
from fedelta.contribution import Contribution, receive
from fedelta.deviation import deviation
from fedelta.errors import BadUpdate, FedeltaError
from fedelta.messages import Broadcast, ClientUpdate
from fedelta.methods.method import Method, MethodState
from fedelta.patch_log import PatchLog
from fedelta.ranks import RankSettings, initial_ranks, promote, quota
from fedelta.seeds import derive_seed
from fedelta.settings import Settings


class FederationSettings(Settings):
    """Who takes part in a round and how updates are weighed.

    Args:
        participation: share of clients sampled each round.
        dropout: simulated probability that a sampled client vanishes after its download.
        weighting: p_i by number of examples, all equal, or one weight for each client in the order of names.
        on_bad_update: skip a client whose update can't be used, or stop the run.
        min_clients: fewer usable updates than this stop the run.
    """

    participation: float = Field(default=1.0, gt=0, le=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    weighting: Literal["examples", "uniform"] | tuple[float, ...] = "examples"
    on_bad_update: Literal["skip", "refuse"] = "skip"
    min_clients: int = Field(default=1, ge=1)


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
        train_loss: mean over contributors by weight, None if none reported it.
        deviation: module → relative deviation of the factors from the mean of products.
        patch_width: largest width of the round's base patch, 0 without one.
    """

    contributors: list[str]
    skipped: dict[str, str]
    promoted: list[str]
    train_loss: float | None
    deviation: dict[str, float]
    patch_width: int


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
        sampled = self._round_size(len(clients))
        if self.settings.min_clients > sampled:
            raise FedeltaError(
                f"federation.min_clients is {self.settings.min_clients}, "
                f"but a round has {sampled} of {len(clients)} clients"
            )
        weights = self.settings.weighting
        if isinstance(weights, tuple):
            if len(weights) != len(clients):
                raise FedeltaError(
                    f"federation.weighting has {len(weights)} weights, expected one for each of {len(clients)} clients"
                )
            if min(weights) < 0 or sum(weights) <= 0:
                raise FedeltaError(f"federation.weighting must be ≥ 0 with a positive sum, found {list(weights)}")
        return ServerState(
            method=self.method.start(shapes, self.ranks.largest, derive_seed(self.seed, "adapter")),
            heads=dict(heads),
            classes=tuple(classes),
            log=PatchLog(dict(shapes)),
            ranks=initial_ranks(clients, self.ranks, self.seed),
            versions=dict.fromkeys(clients, 0),
        )

    def sample(self, state: ServerState) -> list[str]:
        """The clients of this round, drawn without replacement, in the order of their names."""
        # A client of weight 0 would train for nothing.
        clients = [client for client, weight in self._weights(state).items() if weight != 0]
        size = self._round_size(len(clients))
        rng = np.random.default_rng(derive_seed(self.seed, "sample", state.round))
        return [clients[i] for i in sorted(rng.choice(len(clients), size, replace=False))]

    def _round_size(self, clients: int) -> int:
        """How many of so many clients take part in a round."""
        return max(1, quota(self.settings.participation, clients))

    def drops_out(self, state: ServerState, client: str) -> bool:
        """Whether this client is simulated to vanish in this round."""
        rng = np.random.default_rng(derive_seed(self.seed, "dropout", state.round, client))
        return bool(rng.random() < self.settings.dropout)

    def broadcast(self, state: ServerState, client: str) -> Broadcast:
        """What this client is sent: the adapter at its rank and scale, and what its base has not seen."""
        rank = state.ranks[client]
        scale = self.scale(rank)
        tailored = self.method.tailor(state.method, rank)
        adapter = tailored.adapter.with_scale(scale)
        return Broadcast(
            client=client,
            round=state.round,
            rank=rank,
            scale=scale,
            train=self.method.trainable(state.round),
            A={} if tailored.seed_A is not None else {module: pair.A for module, pair in adapter.items()},
            B={module: pair.B for module, pair in adapter.items()},
            seed_A=tailored.seed_A,
            heads=state.heads,
            patch=state.log.since(state.versions[client]),
            wants_validation=self.ranks.allocation == "loss" and client not in state.first_losses,
        )

    def step(
        self,
        state: ServerState,
        sent: Mapping[str, Broadcast],
        replies: Mapping[str, ClientUpdate | Exception],
    ) -> tuple[ServerState, RoundOutcome]:
        """One round: check the replies, aggregate, append the patch, allocate ranks.

        Args:
            state: as broadcast.
            sent: client → the broadcast it was sent.
            replies: client → its update, or why there is none.

        Raises:
            FedeltaError: if fewer than `min_clients` updates can be used, or on the first bad one if the
                setting says refuse.
        """
        contributions, skipped = self._receive(state, sent, replies)
        if len(contributions) < self.settings.min_clients:
            reasons = "; ".join(f"{client}: {reason[:200]}" for client, reason in list(skipped.items())[:3])
            raise FedeltaError(
                f"round {state.round}: {len(contributions)} usable updates, "
                f"expected at least {self.settings.min_clients} ({reasons})"
            )
        method, patch = self.method.aggregate(state.method, contributions)
        for module, pair in method.adapter.items():
            if not bool(torch.isfinite(pair.A).all() and torch.isfinite(pair.B).all()):
                raise FedeltaError(
                    f"round {state.round}: the mean of module {module} is not finite; updates are too large"
                )
        newcomers = {
            c.client: c.metrics["validation_loss"]
            for c in contributions
            if sent[c.client].wants_validation and "validation_loss" in c.metrics
        }
        ranks = promote(state.ranks, state.first_losses, newcomers, self.ranks)
        outcome = RoundOutcome(
            contributors=[c.client for c in contributions],
            skipped=skipped,
            promoted=sorted(client for client in ranks if ranks[client] != state.ranks[client]),
            train_loss=_mean_loss(contributions),
            deviation=deviation(contributions, method.adapter, self.method.absent(state.method, method)),
            patch_width=max((product.width for product in patch.values()), default=0),
        )
        log = state.log.append(patch)
        # A client that failed may or may not have folded what it was sent; it skips what it already has.
        versions = {**state.versions, **{c.client: sent[c.client].patch.end for c in contributions}}
        return ServerState(
            method=replace(method, round=state.round + 1),
            heads=_mean_heads(contributions, state.heads),
            classes=state.classes,
            log=log,
            ranks=ranks,
            versions=versions,
            first_losses={**state.first_losses, **newcomers},
        ), outcome

    def _receive(
        self,
        state: ServerState,
        sent: Mapping[str, Broadcast],
        replies: Mapping[str, ClientUpdate | Exception],
    ) -> tuple[list[Contribution], dict[str, str]]:
        contributions, skipped = [], {}
        weights = self._weights(state)
        for client in sorted(sent):
            reply = replies.get(client, TimeoutError("no reply"))
            if isinstance(reply, ClientUpdate):
                try:
                    contributions.append(receive(reply, sent[client], state.log.shapes, weights[client]))
                    continue
                except BadUpdate as error:
                    reply = error
            if isinstance(reply, BadUpdate) and self.settings.on_bad_update == "refuse":
                raise reply
            skipped[client] = reply.reason if isinstance(reply, BadUpdate) else f"{type(reply).__name__}: {reply}"
        return contributions, skipped

    def _weights(self, state: ServerState) -> dict[str, float | None]:
        """w_i of each client, in the order of names; None is its number of examples."""
        weighting, clients = self.settings.weighting, sorted(state.ranks)
        if isinstance(weighting, tuple):
            return dict(zip(clients, weighting, strict=True))
        return dict.fromkeys(clients, None if weighting == "examples" else 1.0)


def _mean_heads(contributions: list[Contribution], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    total = sum(c.weight for c in contributions)
    heads = {}
    for name, tensor in before.items():
        sums = torch.zeros_like(tensor, dtype=torch.float64)
        for c in contributions:
            sums += c.weight * c.heads[name].double()
        heads[name] = (sums / total).to(tensor.dtype)
    return heads


def _mean_loss(contributions: list[Contribution]) -> float | None:
    losses = [(c.weight, c.metrics["train_loss"]) for c in contributions if "train_loss" in c.metrics]
    return sum(w * loss for w, loss in losses) / sum(w for w, _ in losses) if losses else None
