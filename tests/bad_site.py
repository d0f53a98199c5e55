"""A site that does not do what it should.

python bad_site.py HOW join …                       the site: `fedelta join` with this file as its trainer
python bad_site.py HOW CONFIG SOCKET SITE.json      its trainer
"""

import struct
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from fedelta.flower.site import join
from fedelta.flower.site import site_trainer as site
from fedelta.protocol.messages import ClientUpdate

CLAIM = 10 * 2**30
LATE_S = 12.0


class BadSite(site.SiteTrainer):
    """Answers as it should, and then spoils the answer."""

    how = ""
    first: bytes | None = None

    def train(self, facts: Any, broadcast: Any, blob: bytes) -> tuple[dict[str, Any], bytes]:
        told, answer = super().train(facts, broadcast, blob)
        return told, self.spoil(answer, ClientUpdate.from_bytes(answer, broadcast.client))

    def spoil(self, answer: bytes, update: ClientUpdate) -> bytes:
        factors = {name: dict(found) for name, found in update.factors.items()}
        module = next(iter(factors["B"]))
        if self.how == "nan":
            factors["B"][module] = torch.full_like(factors["B"][module], torch.nan)
        elif self.how == "shape":
            factors["B"][module] = factors["B"][module][:-1]
        elif self.how == "header":
            return struct.pack("<Q", CLAIM) + answer[8:]
        elif self.how == "noise":
            return answer[: len(answer) // 2]
        elif self.how == "replay":
            self.first = self.first or answer
            return self.first
        elif self.how == "late":
            time.sleep(LATE_S)
        changed = {"version": {"version": update.version + 1}, "somebody": {"client": "client-000"}}
        return replace(update, factors=factors, **changed.get(self.how, {})).to_bytes()


if __name__ == "__main__":
    if sys.argv[2] == "join":
        from fedelta.cli.app import main

        join.TRAINER = (__file__, sys.argv[1])
        sys.argv = [sys.argv[0], *sys.argv[2:]]
        main()
    else:
        BadSite.how = sys.argv.pop(1)
        site.SiteTrainer = BadSite  # type: ignore[misc]
        site.main()
