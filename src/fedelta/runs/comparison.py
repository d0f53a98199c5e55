"""Several methods, with some seeds each, on the same data and initial weights."""

from pathlib import Path

from fedelta.errors import FedeltaError
from fedelta.methods import make_method, resolve
from fedelta.runs.assemble import make_server
from fedelta.runs.config import Config
from fedelta.runs.runner import Run, open_run


def comparison_folder(config: Config) -> Path:
    """Where a comparison leaves its files: beside the single run of the same name, not in it."""
    return config.folder.with_name(f"{config.name}-compare")


def comparison_configs(config: Config, methods: tuple[str, ...], seeds: int) -> list[Config]:
    """One configuration for each method and seed; the runs of a seed share data and initial weights.

    Raises:
        FedeltaError: for an unknown method, or one that can't take the configured ranks.
    """
    methods = tuple(resolve(method) for method in methods)
    if len(set(methods)) < len(methods):
        raise FedeltaError(f"methods to compare: {', '.join(methods)}, expected each once")
    configs = []
    for method in methods:
        # The configured options belong to the configured method, and to no other.
        options = config.method.options if method == config.method.name else {}
        make_method(method, **options)
        for seed in range(config.seed, config.seed + seeds):
            configs.append(
                config.model_copy(
                    update={
                        "name": f"{method}-seed{seed}",
                        "output": str(comparison_folder(config)),
                        "compare": config.compare.model_copy(update={"methods": methods, "seeds": seeds}),
                        "seed": seed,
                        "method": config.method.model_copy(update={"name": method, "options": options}),
                    }
                )
            )
    for each in configs:
        make_server(each)
    return configs


def open_runs(folder: Path) -> list[Run]:
    """The finished run in a folder, or the finished runs of a comparison below it.

    Raises:
        FedeltaError: if there is none.
    """
    if (folder / "config.yaml").exists():
        return [open_run(folder)]
    finished = [path.parent for path in sorted(folder.glob("*/result.json"))]
    if not finished:
        raise FedeltaError(f"{folder}: no finished run here")
    return in_order([open_run(path) for path in finished])


def in_order(runs: list[Run]) -> list[Run]:
    """The runs of a comparison as its methods were named, then by seed."""
    order = {method: i for i, method in enumerate(runs[0].config.compare.methods)}
    return sorted(runs, key=lambda run: (order.get(run.config.method.name, len(order)), run.config.seed))
