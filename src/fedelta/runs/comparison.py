"""Compare several methods, with one or more seeds each, on the same data and initial weights."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fedelta.errors import FedeltaError, listed
from fedelta.federation.engines import Observer
from fedelta.federation.engines.shared_round import SharedRound, SharingEngine
from fedelta.federation.run_folder import RunFolder
from fedelta.methods import make_method, resolve
from fedelta.runs.assemble import make_server
from fedelta.runs.config import Config
from fedelta.runs.identity import differing_inputs
from fedelta.runs.runner import Run, open_run, run


def comparison_folder(config: Config) -> Path:
    """Return the folder of a comparison. It is next to the folder of the single run with the same name, not in it."""
    return config.folder.with_name(f"{config.name}-compare")


def comparison_configs(config: Config, methods: tuple[str, ...], seeds: int) -> list[Config]:
    """Build one configuration for each method and seed. Runs with equal seeds share data and initial weights.

    Args:
        config: the configuration to vary.
        methods: names or aliases, each once.
        seeds: number of seeds, counted from `config.seed`.

    Raises:
        FedeltaError: if a method is unknown, is named twice, or does not support the configured ranks.
    """
    methods = tuple(resolve(method) for method in methods)
    if len(set(methods)) < len(methods):
        raise FedeltaError(f"methods to compare: {listed(methods, 20)}, expected each once")
    configs = []
    for method in methods:
        # The configured options are those of the configured method. Other methods use their defaults.
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


def run_comparison(
    configs: Sequence[Config], resume: bool, observer: Observer | None, accept_changed_data: bool = False
) -> list[Run]:
    """Run the configurations of a comparison.

    Args:
        configs: as `comparison_configs` returns them.
        resume: continue interrupted runs and keep finished ones.
        observer: receives progress events.
        accept_changed_data: as for `run`.

    Returns:
        The runs, ordered by method and then by seed.

    Raises:
        FedeltaError: before the first run, if a folder holds a run and `resume` is false.
    """
    if not resume:
        for each in configs:
            RunFolder(each.folder, {}).refuse_existing()
    # Run every method with one seed before the next seed, so that even an interrupted comparison has every method.
    by_seed = sorted(configs, key=lambda each: each.seed)
    engine = partial(SharingEngine, shared=SharedRound())
    return in_order(
        [
            run(each, resume=resume, observer=observer, engine=engine, accept_changed_data=accept_changed_data)
            for each in by_seed
        ]
    )


def open_runs(folder: Path) -> list[Run]:
    """Open the finished run in a folder, or the finished runs of a comparison below it.

    Raises:
        FedeltaError: if there is no finished run, or the runs are not of one comparison.
    """
    if (folder / "config.yaml").exists():
        return [open_run(folder)]
    finished = [path.parent for path in sorted(folder.glob("*/result.json"))]
    if not finished:
        raise FedeltaError(f"{folder}: no finished run here")
    runs = [open_run(path) for path in finished]
    _check_comparable(folder, runs)
    return in_order(runs)


def _check_comparable(folder: Path, runs: Sequence[Run]) -> None:
    """Raise unless the runs have the same task, data and test rows: a mean over others would have no meaning."""
    first = runs[0]
    for other in runs[1:]:
        pairs = ((first.config.task, other.config.task), (first.config.data, other.config.data))
        differing = [name for name, (one, two) in zip(("task", "data"), pairs, strict=True) if one != two]
        if "test rows" in differing_inputs([each.result.get("inputs", {}) for each in (first, other)]):
            differing.append("test rows")
        if differing:
            names = f"{first.folder.path.name} and {other.folder.path.name}"
            raise FedeltaError(
                f"{folder}: {names} differ in {listed(differing)}, so they are not of one comparison; name the folder "
                "of one run or of one comparison"
            )


def in_order(runs: list[Run]) -> list[Run]:
    """Sort the runs of a comparison by the order of its methods, then by seed."""
    order = {method: i for i, method in enumerate(runs[0].config.compare.methods)}
    return sorted(runs, key=lambda one: (order.get(one.config.method.name, len(order)), one.config.seed))
