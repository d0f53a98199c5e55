"""Commands whose help shows what their positional arguments mean."""

import inspect
from typing import Any

from typer.core import TyperCommand
from typer.models import ArgumentInfo


class Command(TyperCommand):
    """A command that keeps the help of its positional arguments.

    From version 8.5 on, click has a help text of its own for an argument, and drops the one that typer has set.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        parameters = inspect.signature(self.callback).parameters if self.callback else {}
        for param in self.params:
            declared = parameters.get(str(param.name))
            for info in getattr(declared.annotation, "__metadata__", ()) if declared else ():
                if isinstance(info, ArgumentInfo) and not getattr(param, "help", None):
                    param.help = info.help
