"""Local training of clients."""

from fedelta.training.local import TrainingSettings, evaluate, predict, score, train

__all__ = ["TrainingSettings", "evaluate", "predict", "score", "train"]
