"""fedelta: federated fine-tuning of language models with LoRA, exactly."""

import os

# Flower's packages report usage unless told not to; a tool for private data makes no such calls.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
# Idle OpenMP threads spin by default, which slows every process beside them; a short spin is free when the
# machine is quiet. Read once by the OpenMP runtime, so it is set before torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
