"""From a source of texts to clients' shards: `sources`, `pydoc`, `partition`, `examples`, `federated`."""

from fedelta.data.examples import Examples
from fedelta.data.federated import Corpus, FederatedData, Shard, build_corpus, build_data, build_shard, label_classes
from fedelta.data.partition import PartitionSettings
from fedelta.data.sources import DataSettings

__all__ = [
    "Corpus",
    "DataSettings",
    "Examples",
    "FederatedData",
    "PartitionSettings",
    "Shard",
    "build_corpus",
    "build_data",
    "build_shard",
    "label_classes",
]
