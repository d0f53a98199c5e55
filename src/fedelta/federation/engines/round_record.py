"""The line of `rounds.jsonl` that a finished round leaves."""

from collections import Counter
from collections.abc import Mapping

from fedelta.federation.engines.traffic import Traffic
from fedelta.federation.records import Events, RoundRecord
from fedelta.federation.server import RoundOutcome, ServerState


def round_record(
    before: ServerState,
    after: ServerState,
    outcome: RoundOutcome,
    scores: Mapping[str, float] | None,
    traffic: Traffic,
    metric: str,
    failed_attempts: list[dict[str, str]],
    clients_validation: dict[str, dict[str, float | None]],
    events: Events,
) -> RoundRecord:
    """Return the line of a round.

    Args:
        before, after: states of the server before and after the round.
        outcome: what the server's step reports.
        scores: scores of the global model; None if it was not evaluated.
        traffic: bytes of the messages.
        metric: name of the task's main score.
        failed_attempts: client → reason, for each attempt with too few usable updates.
        clients_validation: client → scores of its own model, if these are evaluated.
        events: the engine's own keys.
    """
    ranks = Counter(after.ranks.values())
    # A loss below the rounding of fp32 is none; its digits depend on where tensors lie in memory.
    lost = {module: float(f"{share:.6g}") if share > 1e-6 else 0.0 for module, share in outcome.lost.items()}
    relative = {module: deviation.relative for module, deviation in outcome.deviation.items()}
    return {
        "round": before.round,
        "clients": outcome.contributors,
        "shares": outcome.shares,
        # The last digits of a sum depend on where its tensor lies in memory, so they are not recorded.
        "norms": {client: [float(f"{norm:.6g}") for norm in norms] for client, norms in outcome.norms.items()},
        "skipped": outcome.skipped,
        "promoted": outcome.promoted,
        "pruned": outcome.pruned,
        "ranks": {str(rank): ranks[rank] for rank in sorted(ranks)},
        "train_loss": outcome.train_loss,
        "validation": scores,
        "metric": metric,
        "bytes_down": traffic.total_down(),
        "bytes_up": traffic.total_up(),
        "bytes_by_client": {client: [count.total, traffic.up[client].total] for client, count in traffic.down.items()},
        "deviation": relative,
        "scaled_deviation": {module: deviation.scaled for module, deviation in outcome.deviation.items()},
        "deviation_mean": _mean(relative),
        "lost": lost,
        "lost_mean": _mean(lost),
        "patch_width": outcome.patch_width,
        "energy_by_rank": outcome.energy,
        "version": after.log.version,
        "failed_attempts": failed_attempts,
        "clients_validation": clients_validation,
        **events,
    }


def _mean(by_module: Mapping[str, float]) -> float | None:
    return sum(by_module.values()) / len(by_module) if by_module else None
