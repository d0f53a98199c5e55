"""Local training of clients."""

from fedelta.training.local import TrainingSettings, train

__all__ = ["TrainingSettings", "train"]
