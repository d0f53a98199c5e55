"""fedelta: federated fine-tuning of language models with LoRA, exactly.

    import fedelta

    run = fedelta.run("my.yaml", method="fedex")
    run.rounds                                   # a pandas DataFrame, one row a round
    run.export(adapter="my-adapter")             # a PEFT folder

Names are imported when they are first used: `import fedelta` itself is fast.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedelta.aggregate.step import aggregate_folders as aggregate_folders
    from fedelta.cli.progress import TerminalProgress
    from fedelta.errors import FedeltaError as FedeltaError
    from fedelta.methods import make_method as make_method
    from fedelta.runs.api import compare as compare
    from fedelta.runs.api import configure as configure
    from fedelta.runs.api import export as export
    from fedelta.runs.api import run as run
    from fedelta.runs.config import Config as Config
    from fedelta.runs.config import load_config as load_config
    from fedelta.runs.generate import generate as generate
    from fedelta.runs.predict import predict as predict
    from fedelta.runs.runner import Run as Run
    from fedelta.runs.runner import open_run as open_run

    Progress = TerminalProgress

__version__ = "0.2.0"

_HOMES = {
    "Config": "fedelta.runs.config",
    "FedeltaError": "fedelta.errors",
    "Progress": "fedelta.cli.progress:TerminalProgress",
    "Run": "fedelta.runs.runner",
    "aggregate_folders": "fedelta.aggregate.step",
    "compare": "fedelta.runs.api",
    "configure": "fedelta.runs.api",
    "export": "fedelta.runs.api",
    "generate": "fedelta.runs.generate",
    "load_config": "fedelta.runs.config",
    "make_method": "fedelta.methods",
    "open_run": "fedelta.runs.runner",
    "predict": "fedelta.runs.predict",
    "run": "fedelta.runs.api",
}
"""Public name → the module that defines it, with the name there if it differs."""

__all__ = [*sorted(_HOMES), "__version__"]


# PEFT imports bitsandbytes wherever it is installed, which on some CPUs warns that an optional kernel is not.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedelta' has no attribute {name!r}")
    module, _, original = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), original or name)


def __dir__() -> list[str]:
    return __all__
