"""`Farewell`: the last message from the server to each site. The run has ended, and this is its adapter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch

from fedelta.errors import BadBroadcast, in_one_line
from fedelta.protocol.serialization import pack, unpack


@dataclass(frozen=True, eq=False)
class Farewell:
    """Message to a site after the last round.

    Args:
        rounds: number of finished rounds.
        config: content of the adapter's `adapter_config.json`; empty if the adapter is not sent.
        weights: content of its `adapter_model.safetensors`, with the base patches folded in.
    """

    rounds: int
    config: Mapping[str, Any] = field(default_factory=dict)
    weights: bytes = b""

    def to_bytes(self) -> bytes:
        """Serialize the message."""
        content = torch.frombuffer(bytearray(self.weights), dtype=torch.uint8) if self.weights else torch.empty(0)
        return pack({"weights": content}, {"rounds": self.rounds, "config": dict(self.config)})

    @classmethod
    def from_bytes(cls, blob: bytes) -> "Farewell":
        """Read the message.

        Raises:
            BadBroadcast: if it is damaged.
        """
        try:
            tensors, facts = unpack(blob)
            if not isinstance(facts["config"], dict):
                raise TypeError("its adapter_config.json is not an object")
            weights = tensors["weights"].numpy().tobytes()
            if weights:
                safetensors.torch.load(weights)
            return cls(int(facts["rounds"]), facts["config"], weights)
        except Exception as error:
            raise BadBroadcast(f"the server's last message can't be read: {in_one_line(error)}") from error
