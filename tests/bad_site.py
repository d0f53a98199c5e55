"""A site whose trainer returns bad updates.

HOW is one way, or several separated by commas, one for each round.

python bad_site.py HOW join …                       starts the site: `fedelta join` with this file as its trainer
python bad_site.py HOW CONFIG SOCKET SITE.json      is the trainer
"""

import os
import struct
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from fedelta.errors import FedeltaError
from fedelta.flower.site import join
from fedelta.flower.site import site_trainer as site
from fedelta.learning.device import DeviceError
from fedelta.protocol.messages import ClientUpdate

CANARY = "quokkarow"
CLAIMED_BYTES = 10 * 2**30
LATE_S = 12.0


class BadSite(site.SiteTrainer):
    """Trains as it should, and then spoils the update. `ways` says how in each round, in turn."""

    ways: tuple[str, ...] = ("",)
    how = ""
    first: bytes | None = None

    def train(self, facts: Any, broadcast: Any, blob: bytes) -> tuple[dict[str, Any], bytes]:
        self.how = self.ways[broadcast.round % len(self.ways)]
        if self.how == "raise":
            raise RuntimeError(f"row 3 of {self.settings.source} holds {CANARY}")
        if self.how == "input":
            raise FedeltaError(f"row 3 of {self.settings.source} holds {CANARY}")
        if self.how == "memory":
            raise DeviceError(f"out of memory with {CANARY}")
        if self.how == "die":
            os._exit(3)
        reply_facts, update = super().train(facts, broadcast, blob)
        return reply_facts, self.spoil(update, ClientUpdate.from_bytes(update, broadcast.client))

    def spoil(self, blob: bytes, update: ClientUpdate) -> bytes:
        factors = {name: dict(tensors) for name, tensors in update.factors.items()}
        module = next(iter(factors["B"]))
        if self.how == "nan":
            factors["B"][module] = torch.full_like(factors["B"][module], torch.nan)
        elif self.how == "shape":
            factors["B"][module] = factors["B"][module][:-1]
        elif self.how == "header":
            return struct.pack("<Q", CLAIMED_BYTES) + blob[8:]
        elif self.how == "noise":
            return blob[: len(blob) // 2]
        elif self.how == "replay":
            self.first = self.first or blob
            return self.first
        elif self.how == "huge":
            factors["B"][module] = torch.full_like(factors["B"][module], 1e30)
        elif self.how == "far":
            factors = {name: {m: 1e3 * t for m, t in tensors.items()} for name, tensors in factors.items()}
        elif self.how == "late":
            time.sleep(LATE_S)
        changed: dict[str, dict[str, Any]] = {
            "version": {"version": update.version + 1},
            "other client": {"client": "client-000"},
            "examples": {"examples": 10**12},
            "loss": {"metrics": {"train_loss": 1e20}},
            "escapes": {"heads": {**update.heads, "\x1b[2J[red]" + "x" * 10**6: torch.ones(1)}},
        }
        return replace(update, factors=factors, **changed.get(self.how, {})).to_bytes()


if __name__ == "__main__":
    if sys.argv[2] == "join":
        from fedelta.cli.app import main

        join.TRAINER = (__file__, sys.argv[1])
        sys.argv = [sys.argv[0], *sys.argv[2:]]
        main()
    else:
        BadSite.ways = tuple(sys.argv.pop(1).split(","))
        site.SiteTrainer = BadSite  # type: ignore[misc]
        site.main()
