"""Tasks that a model learns, one file per kind."""

from fedelta.learning.tasks.classification import Classification
from fedelta.learning.tasks.completion import Completion
from fedelta.learning.tasks.conversation import Conversation
from fedelta.learning.tasks.language import LanguageTask
from fedelta.learning.tasks.regression import Regression
from fedelta.learning.tasks.task import Answer, Outcome, Task, Unit, evaluate

__all__ = [
    "Answer",
    "Classification",
    "Completion",
    "Conversation",
    "LanguageTask",
    "Outcome",
    "Regression",
    "Task",
    "Unit",
    "evaluate",
]
