"""Select the texts of a run whose activations below the lowest adapter are cached, and compute them in workers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedelta.federation.engines.workers import Result, Workers
from fedelta.learning.data import Examples
from fedelta.learning.model.activation_cache import ActivationCache
from fedelta.learning.shards import Shard


class ActivationCaches:
    """The cached texts of a run.

    They are selected once, by name and size. Caching changes the last bits of a result, so the selection must not
    depend on which clients were sampled or where the run was resumed.

    Args:
        cache: the model's activation cache, or None.
        workers: workers that compute activations.
        validation: the validation split; selected first because it is read most often.
        shards: client → its rows. Training rows are selected in the order of client names, unless the layers below
            the lowest adapter apply dropout.
        max_bytes: maximum size of all cached activations, in bytes.

    Attributes:
        chosen: the selected sets of texts.
    """

    def __init__(
        self,
        cache: ActivationCache | None,
        workers: Workers,
        validation: Examples,
        shards: Mapping[str, Shard],
        max_bytes: float,
    ) -> None:
        self.activation_cache = cache
        self.workers = workers
        self.chosen: set[Examples] = set()
        if cache is None:
            return
        training = [] if cache.drops_out else [shards[client].train for client in sorted(shards)]
        for examples in [validation, *training]:
            if (size := cache.bytes_of(examples)) <= max_bytes:
                self.chosen.add(examples)
                max_bytes -= size

    def fill(self, sets: Sequence[Examples]) -> None:
        """Compute the missing activations of those sets of texts that were selected."""
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
