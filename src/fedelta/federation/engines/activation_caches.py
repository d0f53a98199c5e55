"""Which texts of a run have their activations below the lowest adapter kept, and who computes them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedelta.federation.engines.workers import Result, Workers
from fedelta.learning.data import Examples
from fedelta.learning.model.activation_cache import ActivationCache
from fedelta.learning.shards import Shard


class ActivationCaches:
    """Chosen once, by name and size: what is kept, and with it the last bits of a result, must not depend on
    who was sampled, nor on where a run was resumed.

    Args:
        cache: of the model, or None.
        workers: that compute activations.
        validation: kept first, as it is read most.
        shards: client → its rows, kept in the order of names, where training has no dropout in the cache.
        most: bytes to keep altogether.
    """

    def __init__(
        self,
        cache: ActivationCache | None,
        workers: Workers,
        validation: Examples,
        shards: Mapping[str, Shard],
        most: float,
    ) -> None:
        self.activation_cache = cache
        self.workers = workers
        self.chosen: set[Examples] = set()
        if cache is None:
            return
        wanted = [] if cache.drops_out else [shards[client].train for client in sorted(shards)]
        for examples in [validation, *wanted]:
            if (size := cache.bytes_of(examples)) <= most:
                self.chosen.add(examples)
                most -= size

    def fill(self, sets: Sequence[Examples]) -> None:
        """Compute what is missing for these, as far as it was chosen."""
        if (cache := self.activation_cache) is None:
            return
        new = [examples for examples in sets if examples in self.chosen and not cache.keeps(examples)]
        tasks = [(examples, rows) for examples in new for rows in cache.batches(examples)]

        def compute(task: int) -> Result:
            return Result({}, [cache.compute(*tasks[task]).view(torch.uint8).numpy().tobytes()])

        costs = [float(sum(map(examples.length, rows))) for examples, rows in tasks]
        results = self.workers.map(compute, costs)
        for examples in new:
            batches = [self._read(next(results)) for _ in cache.batches(examples)]
            cache.keep(examples, batches)

    def _read(self, result: Result) -> Tensor:
        assert self.activation_cache is not None
        flat = torch.frombuffer(bytearray(result.blobs[0]), dtype=self.activation_cache.dtype)
        return flat.view(-1, self.activation_cache.hidden)
