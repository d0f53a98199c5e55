"""A SuperNode that polls for messages about three times a second. Flower's own SuperNode polls every three seconds.

python -m fedelta.flower.site.supernode [the arguments of flower-supernode]
"""

import time
from types import SimpleNamespace

from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode

POLL_S = 0.3


def _sleep(seconds: float) -> None:
    time.sleep(min(seconds, POLL_S))


if __name__ == "__main__":
    # If a later version of Flower lacks this attribute, the node still works, at Flower's own speed.
    if hasattr(start_client_internal, "time"):
        start_client_internal.time = SimpleNamespace(**{**vars(time), "sleep": _sleep})
    flower_supernode()
