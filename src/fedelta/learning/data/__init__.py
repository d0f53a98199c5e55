"""Data: `sources` reads texts and labels, `examples` holds their tokens, `partition` assigns rows to clients."""

from fedelta.learning.data.examples import Examples
from fedelta.learning.data.partition import PartitionSettings
from fedelta.learning.data.settings import Columns, DataSettings

__all__ = [
    "Columns",
    "DataSettings",
    "Examples",
    "PartitionSettings",
]
