"""Limits on what the requests of all sites together may hold in memory, and on the requests of one site."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ByteBudget:
    """Lets requests wait until there is memory for their bodies.

    A site that sends slowly or much uses up its own share only.

    Args:
        total: maximum bytes of all requests.
        per_site: maximum bytes of the requests of one site.
        requests_per_site: maximum number of requests of one site that are served at the same time.
    """

    def __init__(self, total: int, per_site: int, requests_per_site: int) -> None:
        self.total = total
        self.per_site = per_site
        self.requests_per_site = requests_per_site
        self._bytes: Counter[str] = Counter()
        self._requests: Counter[str] = Counter()
        self._waiting: set[asyncio.Future[None]] = set()

    @asynccontextmanager
    async def reserve(self, site: str, size: int) -> AsyncIterator[None]:
        """Wait until a request of this size fits, and hold its bytes inside the block.

        Args:
            site: name of the site.
            size: size of the body, at most `per_site`.
        """
        while not self._fits(site, size):
            change = asyncio.get_running_loop().create_future()
            self._waiting.add(change)
            try:
                await change
            finally:
                self._waiting.discard(change)
        self._bytes[site] += size
        self._requests[site] += 1
        try:
            yield
        finally:
            self._bytes[site] -= size
            self._requests[site] -= 1
            if not self._requests[site]:
                del self._bytes[site], self._requests[site]
            for change in self._waiting:
                if not change.done():
                    change.set_result(None)

    def _fits(self, site: str, size: int) -> bool:
        return (
            self._requests[site] < self.requests_per_site
            and self._bytes[site] + size <= self.per_site
            and self._bytes.total() + size <= self.total
        )


class Pace:
    """Delays the requests of a site that sends more than a node does.

    Args:
        rate: requests per second of one site in the long run.
        burst: number of requests that are not delayed after a pause.
    """

    def __init__(self, rate: float, burst: int) -> None:
        self.rate = rate
        self.burst = burst
        self._due: dict[str, float] = {}

    async def wait(self, site: str) -> None:
        """Wait until the site may send its next request."""
        due = self.count(site)
        await asyncio.sleep(max(0.0, due - time.monotonic() - self.burst / self.rate))

    def count(self, site: str, requests: int = 1) -> float:
        """Count requests of a site, and return when all of its requests so far would be served at this rate."""
        now = time.monotonic()
        due = self._due[site] = max(now, self._due.get(site, now)) + requests / self.rate
        return due
