"""Texts, their tokens, and who holds which: `sources`, `pydoc`, `examples`, `partition`."""

from fedelta.learning.data.examples import Examples
from fedelta.learning.data.partition import PartitionSettings
from fedelta.learning.data.sources import DataSettings

__all__ = [
    "DataSettings",
    "Examples",
    "PartitionSettings",
]
