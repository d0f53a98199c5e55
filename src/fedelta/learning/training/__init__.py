"""Local training of clients."""

from fedelta.learning.training.local import TrainingSettings, train

__all__ = ["TrainingSettings", "train"]
