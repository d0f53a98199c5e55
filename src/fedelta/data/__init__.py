"""Texts, their tokens, and who holds which: `sources`, `pydoc`, `examples`, `partition`."""

from fedelta.data.examples import Examples
from fedelta.data.partition import PartitionSettings
from fedelta.data.sources import DataSettings

__all__ = [
    "DataSettings",
    "Examples",
    "PartitionSettings",
]
