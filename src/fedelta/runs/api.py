"""fedelta in a program or a notebook: what `import fedelta` offers of runs.

The functions take what a configuration file holds, or objects that are loaded already.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedelta.errors import FedeltaError
from fedelta.federation.engines import Observer
from fedelta.learning.in_memory import remember_data, remember_model
from fedelta.learning.model.base_model import fingerprint
from fedelta.runs import runner
from fedelta.runs.comparison import comparison_configs, in_order
from fedelta.runs.config import Config, load_config, parse_config, set_key
from fedelta.runs.export import export_run
from fedelta.runs.runner import Run

ConfigLike = Config | Mapping[str, Any] | str | Path | None
"""A configuration, its keys and values, the path of a YAML file, or None for the built-in example."""


def configure(
    config: ConfigLike = None, *, data: Any = None, model: Any = None, tokenizer: Any = None, **changes: Any
) -> Config:
    """A checked configuration from a file, a mapping or objects in memory.

    Args:
        config: where to start from.
        data: rows in the place of `data.source`: a `datasets.Dataset`, a list of dicts, or a mapping of split names to
            either.
        model: a loaded transformers model in the place of `model.name`. Runs train copies of it.
        tokenizer: the model's; required with a model.
        **changes: keys of the configuration. A dict is laid over the section of that name: `training={"steps": 5}`.

    Returns:
        The configuration with every default filled in.

    Raises:
        FedeltaError: one line that names the key, what was found and what was expected.

    Example:
        >>> import fedelta
        >>> config = fedelta.configure({"method": "fedex"}, rounds=3, training={"steps": 5})
        >>> config.method.name, config.rounds, config.training.steps
        ('fedex', 3, 5)
    """
    plain = _plain(config)
    for key, value in changes.items():
        if isinstance(value, Mapping) and key != "method":
            for name, below in value.items():
                set_key(plain, f"{key}.{name}", below)
        else:
            set_key(plain, key, value)
    if data is not None:
        set_key(plain, "data.source", remember_data(data))
    if model is not None:
        if tokenizer is None:
            raise FedeltaError("a model that is passed needs its tokenizer: tokenizer=…")
        set_key(plain, "model.name", remember_model(model, tokenizer, fingerprint(model)))
        set_key(plain, "model.dtype", str(model.dtype).removeprefix("torch."))
    elif tokenizer is not None:
        raise FedeltaError("a tokenizer was passed without its model: model=…")
    return parse_config(plain)


def _plain(config: ConfigLike) -> dict[str, Any]:
    if isinstance(config, Config):
        return config.dump()
    if isinstance(config, Mapping):
        return dict(config)
    return load_config(None if config is None else Path(config)).dump()


def run(
    config: ConfigLike = None,
    *,
    data: Any = None,
    model: Any = None,
    tokenizer: Any = None,
    resume: bool = False,
    observer: Observer | None = None,
    profile: bool = False,
    **changes: Any,
) -> Run:
    """Train one configuration to its end.

    Args:
        config, data, model, tokenizer, **changes: as for `configure`.
        resume: continue from the last finished round, if the run's folder has one.
        observer: is told of progress; `fedelta.Progress()` draws bars.
        profile: measure where the time went.

    Returns:
        The finished run: `rounds` as a pandas DataFrame, `test` scores, the `adapter` folder, `export(…)`.

    Raises:
        FedeltaError: one line for bad input; rounds that had finished are kept.

    Example:
        >>> import fedelta
        >>> run = fedelta.run("my.yaml", method="fedex", rounds=20)  # doctest: +SKIP
        >>> run.rounds[["train_loss", "validation_accuracy"]].tail(1)  # doctest: +SKIP
    """
    made = configure(config, data=data, model=model, tokenizer=tokenizer, **changes)
    return runner.run(made, resume=resume, observer=observer, profile=profile)


def compare(
    config: ConfigLike = None,
    methods: Sequence[str] | None = None,
    *,
    seeds: int | None = None,
    data: Any = None,
    model: Any = None,
    tokenizer: Any = None,
    resume: bool = False,
    observer: Observer | None = None,
    **changes: Any,
) -> list[Run]:
    """Train several methods on the same data and initial weights.

    Args:
        config, data, model, tokenizer, **changes: as for `configure`.
        methods: names; None takes `compare.methods` of the configuration.
        seeds: runs of each method; None takes `compare.seeds`.
        resume: continue runs that were interrupted, and keep those that are finished.
        observer: is told of progress.

    Returns:
        The runs, by method and then by seed.
    """
    made = configure(config, data=data, model=model, tokenizer=tokenizer, **changes)
    configs = comparison_configs(made, tuple(methods or made.compare.methods), seeds or made.compare.seeds)
    # Seed by seed, so that an interrupted comparison still compares.
    in_turn = sorted(configs, key=lambda each: each.seed)
    return in_order([runner.run(each, resume=resume, observer=observer) for each in in_turn])


def export(
    run: Run | str | Path,
    *,
    adapter: str | Path | None = None,
    merged: str | Path | None = None,
    rank: int | None = None,
) -> list[str]:
    """Write the model of a run as one PEFT adapter, a merged model, or both, with base patches folded in.

    Args:
        run: a run or its folder; of an unfinished run the last finished round is exported.
        adapter, merged: folders to write, which must not exist.
        rank: cut the adapter to this rank.

    Returns:
        A line for each thing that was written.

    Raises:
        FedeltaError: if there is no checkpoint, an output exists, or the method has no global model.
    """
    folder = run.folder.path if isinstance(run, Run) else Path(run)
    if adapter is None and merged is None:
        raise FedeltaError("export: say adapter=…, merged=…, or both")
    return export_run(
        folder, None if adapter is None else Path(adapter), None if merged is None else Path(merged), rank
    )
