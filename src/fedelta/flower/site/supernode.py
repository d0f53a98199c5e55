"""A SuperNode that asks for messages three times a second; Flower's own sleeps three seconds between two questions.

python -m fedelta.flower.site.supernode [the arguments of flower-supernode]
"""

import time
from types import SimpleNamespace

from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode

ASK_S = 0.3


def _sleep(seconds: float) -> None:
    time.sleep(min(seconds, ASK_S))


if __name__ == "__main__":
    # Where a later version has no such name, the node is as slow as Flower's own, and no worse.
    if hasattr(start_client_internal, "time"):
        start_client_internal.time = SimpleNamespace(**{**vars(time), "sleep": _sleep})
    flower_supernode()
