"""Clients that join or leave a run between two rounds."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from fedelta.errors import FedeltaError, quantity
from fedelta.federation.server import Server, ServerState


def why_not_join(server: Server, state: ServerState, rank: int) -> str | None:
    """Return why a client of this rank cannot join a run that has started, or None if it can."""
    largest = server.ranks.largest
    if isinstance(server.settings.weighting, tuple):
        return "federation.weighting lists the weights of the clients at the start"
    if rank > largest:
        return f"its rank is {rank} and the run's adapter has rank {largest}; it can join with --rank {largest}"
    if not server.method.mixed_ranks and set(state.ranks.values()) - {rank}:
        return f"method {server.method.name} needs equal ranks, and its rank is {rank} instead of {largest}"
    return None


def change_clients(server: Server, state: ServerState, joined: Mapping[str, int], left: Collection[str]) -> ServerState:
    """Return the state with more or fewer clients.

    A new client is at base version 0, so its first broadcast holds all base patches. A client that has left and comes
    back is a new one. If `weighting` is a list, a client that has left keeps its place in it, and is skipped when it is
    sampled.

    Args:
        server: the rules of the run.
        state: the state between two rounds.
        joined: client → rank of each new client, for which `why_not_join` returns None.
        left: clients that have left.

    Raises:
        FedeltaError: if fewer clients remain than a round needs.
    """
    if isinstance(server.settings.weighting, tuple):
        left = []
    if not joined and not left:
        return state
    ranks = {**{client: rank for client, rank in state.ranks.items() if client not in left}, **joined}
    if len(ranks) < server.settings.min_clients:
        raise FedeltaError(
            f"round {state.round}: {quantity(len(ranks), 'client')} left, "
            f"and federation.min_clients is {server.settings.min_clients}"
        )
    return replace(
        state,
        ranks=dict(sorted(ranks.items())),
        versions={client: 0 if client in joined else state.versions[client] for client in sorted(ranks)},
        first_losses={client: loss for client, loss in state.first_losses.items() if client in ranks},
    )
