"""The table of `fedelta run --profile`: time by phase, compared with the limit of the machine."""

from rich.table import Table

from fedelta.runs.profile import Profile


def profile_table(profile: Profile) -> Table:
    """Tabulate seconds and shares of each phase; the clients' time is split into phases and waiting."""
    total = sum(profile.wall.values())
    table = Table(title=f"{total:.1f} s in rounds, workers: {profile.limit.workers}", title_justify="left")
    for name in ("phase", "seconds", "share", "of the FLOP limit"):
        table.add_column(name, justify="left" if name == "phase" else "right")

    def add(name: str, seconds: float, limit: float | None = None) -> None:
        share = f"{limit / seconds:.0%}" if limit is not None and seconds > 0 else ""
        table.add_row(name, f"{seconds:.2f}", f"{seconds / total:.0%}" if total else "", share)

    clients = profile.wall.get("clients", 0.0)
    add("clients", clients, profile.training_limit)
    workers = profile.limit.workers
    for phase, seconds in sorted(profile.inside.items(), key=lambda item: -item[1]):
        add(f"  {phase}", seconds / workers)
    add("  waiting", max(0.0, clients - sum(profile.inside.values()) / workers))
    for phase, seconds in profile.wall.items():
        if phase != "clients":
            add(phase, seconds, profile.evaluation_limit if phase == "evaluation" else None)
    tokens, padded = profile.counts.get("tokens", 0), profile.counts.get("padded_tokens", 0)
    rate = profile.limit.rate / 1e9
    table.caption = (
        f"{tokens:,} tokens trained, {padded / max(tokens, 1) - 1:.0%} more with padding. Limit: texts without padding "
        f"at {rate:.0f} GFLOP/s, the rate of square products in all workers"
    )
    table.caption_justify = "left"
    return table
