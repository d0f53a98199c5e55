"""What a model learns to do with a row of text: one file a kind of task."""

from fedelta.learning.tasks.classification import Classification
from fedelta.learning.tasks.completion import Completion
from fedelta.learning.tasks.regression import Regression
from fedelta.learning.tasks.task import Answer, Task, Unit, evaluate

__all__ = ["Answer", "Classification", "Completion", "Regression", "Task", "Unit", "evaluate"]
