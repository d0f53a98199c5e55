"""Data: `sources` and `pydoc` read texts, `examples` holds their tokens, `partition` assigns rows to clients."""

from fedelta.learning.data.examples import Examples
from fedelta.learning.data.partition import PartitionSettings
from fedelta.learning.data.sources import DataSettings

__all__ = [
    "DataSettings",
    "Examples",
    "PartitionSettings",
]
