"""Train, compare and export runs from a program or a notebook.

`import fedelta` offers these functions. They take configuration keys and values, or objects that are already loaded.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedelta.errors import FedeltaError
from fedelta.federation.engines import Observer
from fedelta.learning.data.in_memory import remember_data
from fedelta.learning.digests import model_digest
from fedelta.learning.in_memory import remember_model
from fedelta.runs import runner
from fedelta.runs.comparison import comparison_configs, run_comparison
from fedelta.runs.config import Config, load_config, parse_config
from fedelta.runs.config_file import set_key
from fedelta.runs.export import export_run
from fedelta.runs.runner import Run

ConfigLike = Config | Mapping[str, Any] | str | Path | None
"""A configuration: a `Config`, a mapping of its keys, the path of a YAML file, or None for the built-in example."""


def configure(
    config: ConfigLike = None, *, data: Any = None, model: Any = None, tokenizer: Any = None, **changes: Any
) -> Config:
    """Build and check a configuration from a file, a mapping, or objects in memory.

    Args:
        config: the configuration to start from. None is the built-in example.
        data: rows to use instead of `data.source`: a `datasets.Dataset`, a DataFrame, a list of dicts, or a mapping
            from split names to these.
        model: a loaded transformers model to use instead of `model.name`. Runs train copies of it.
        tokenizer: the tokenizer of `model`. It is required with `model`, and only allowed with it.
        **changes: configuration keys to change. A dict changes the given keys of a section and leaves its other keys:
            `training={"steps": 5}`. A dict for `method` replaces the whole section.

    Returns:
        The configuration, with every default filled in.

    Raises:
        FedeltaError: if a key or value is not valid. Its one line names the key, the value and what was expected.

    Example:
        >>> import fedelta
        >>> config = fedelta.configure({"method": "fedex"}, rounds=3, training={"steps": 5})
        >>> config.method.name, config.rounds, config.training.steps
        ('fedex', 3, 5)
    """
    plain = _plain(config)
    for key, value in changes.items():
        if isinstance(value, Mapping) and key != "method":
            for name, new_value in value.items():
                set_key(plain, f"{key}.{name}", new_value)
        else:
            set_key(plain, key, value)
    if data is not None:
        set_key(plain, "data.source", remember_data(data))
    if model is not None:
        if tokenizer is None:
            raise FedeltaError("model=… needs its tokenizer: pass tokenizer=… as well")
        set_key(plain, "model.name", remember_model(model, tokenizer, model_digest(model)))
        set_key(plain, "model.dtype", str(model.dtype).removeprefix("torch."))
    elif tokenizer is not None:
        raise FedeltaError("tokenizer=… was passed without its model: pass model=… as well")
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
    accept_changed_data: bool = False,
    **changes: Any,
) -> Run:
    """Train one configuration to its last round, then test and export the final model.

    Args:
        config, data, model, tokenizer, **changes: as for `configure`.
        resume: continue from the last finished round, if the run's folder has one.
        observer: receives progress events. `fedelta.Progress()` draws progress bars.
        profile: measure where the time was spent.
        accept_changed_data: resume even if rows, tokenizer or base model have changed since the run began.

    Returns:
        The finished run: `rounds` (a pandas DataFrame), `test` (scores), `adapter` (a PEFT folder) and `export(…)`.

    Raises:
        FedeltaError: if the input is not valid. The message is one line, and finished rounds are kept.

    Example:
        >>> import fedelta
        >>> run = fedelta.run("my.yaml", method="fedex", rounds=20)  # doctest: +SKIP
        >>> run.rounds[["train_loss", "validation_accuracy"]].tail(1)  # doctest: +SKIP
    """
    checked = configure(config, data=data, model=model, tokenizer=tokenizer, **changes)
    return runner.run(
        checked, resume=resume, observer=observer, profile=profile, accept_changed_data=accept_changed_data
    )


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
    accept_changed_data: bool = False,
    **changes: Any,
) -> list[Run]:
    """Train several methods on the same data and initial weights.

    Args:
        config, data, model, tokenizer, **changes: as for `configure`.
        methods: names of the methods. None uses `compare.methods` of the configuration.
        seeds: number of runs of each method. None uses `compare.seeds`.
        resume: continue interrupted runs and keep finished ones.
        observer: receives progress events.
        accept_changed_data: as for `run`.

    Returns:
        The runs, ordered by method and then by seed.

    Raises:
        FedeltaError: if the input is not valid, or a method does not support the configured ranks.
    """
    checked = configure(config, data=data, model=model, tokenizer=tokenizer, **changes)
    configs = comparison_configs(checked, tuple(methods or checked.compare.methods), seeds or checked.compare.seeds)
    return run_comparison(configs, resume, observer, accept_changed_data)


def export(
    run: Run | str | Path,
    *,
    adapter: str | Path | None = None,
    merged: str | Path | None = None,
    rank: int | None = None,
) -> list[str]:
    """Write the global model of a run as a PEFT adapter, a merged model, or both.

    Patches of the base are folded in. A method without a global model writes one adapter for each client.

    Args:
        run: a run or its folder. For an unfinished run, the state after the last finished round is exported.
        adapter: folder for the PEFT adapter. It must not exist.
        merged: folder for the merged model. It must not exist.
        rank: cut the adapter to this rank.

    Returns:
        One line of text for each output.

    Raises:
        FedeltaError: if there is no checkpoint, an output folder exists, or `merged` or `rank` is given for a method
            without a global model.
    """
    folder = run.folder.path if isinstance(run, Run) else Path(run)
    return export_run(folder, adapter, merged, rank)
