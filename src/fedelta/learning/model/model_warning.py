"""The category of warnings about a model, which the command line prints as one line."""


class ModelWarning(UserWarning):
    """Something about a model that its user should know, and that does not stop a run."""
