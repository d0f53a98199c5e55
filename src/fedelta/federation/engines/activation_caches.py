"""Which texts of a run have their activations below the lowest adapter kept, and who computes them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedelta.federation.engines.workers import Result, Workers
from fedelta.learning.data import Examples
from fedelta.learning.model.activation_cache import Prefix
from fedelta.learning.shards import Shard


class Prefixes:
    """Chosen once, by name and size: what is kept, and with it the last bits of a result, must not depend on
    who was sampled, nor on where a run was resumed.

    Args:
        prefix: of the model, or None.
        workers: that compute activations.
        validation: kept first, as it is read most.
        shards: client → its rows, kept in the order of names, where training has no dropout in the prefix.
        most: bytes to keep altogether.
    """

    def __init__(
        self, prefix: Prefix | None, workers: Workers, validation: Examples, shards: Mapping[str, Shard], most: float
    ) -> None:
        self.prefix = prefix
        self.workers = workers
        self.chosen: set[Examples] = set()
        if prefix is None:
            return
        wanted = [] if prefix.drops_out else [shards[client].train for client in sorted(shards)]
        for examples in [validation, *wanted]:
            if (size := prefix.bytes_of(examples)) <= most:
                self.chosen.add(examples)
                most -= size

    def fill(self, sets: Sequence[Examples]) -> None:
        """Compute what is missing for these, as far as it was chosen."""
        if (prefix := self.prefix) is None:
            return
        new = [examples for examples in sets if examples in self.chosen and not prefix.keeps(examples)]
        tasks = [(examples, rows) for examples in new for rows in prefix.batches(examples)]

        def compute(task: int) -> Result:
            return Result({}, [prefix.compute(*tasks[task]).view(torch.uint8).numpy().tobytes()])

        costs = [float(sum(map(examples.length, rows))) for examples, rows in tasks]
        results = self.workers.map(compute, costs)
        for examples in new:
            batches = [self._read(next(results)) for _ in prefix.batches(examples)]
            prefix.keep(examples, batches)

    def _read(self, result: Result) -> Tensor:
        assert self.prefix is not None
        flat = torch.frombuffer(bytearray(result.blobs[0]), dtype=self.prefix.dtype)
        return flat.view(-1, self.prefix.hidden)
