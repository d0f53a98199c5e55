"""Local training of clients."""

from fedelta.training.local import TrainingSettings, evaluate, train

__all__ = ["TrainingSettings", "evaluate", "train"]
