"""What a model learns to do with a row of text: one file a kind of task."""

from fedelta.tasks.classification import Classification
from fedelta.tasks.completion import Completion
from fedelta.tasks.regression import Regression
from fedelta.tasks.task import Answer, Task, Unit, evaluate

__all__ = ["Answer", "Classification", "Completion", "Regression", "Task", "Unit", "evaluate"]
