"""A Jinja environment for chat templates, which are programs by strangers: bounded, and equal on every day and machine.

It has what transformers gives to templates (`raise_exception`, `strftime_now`, `tojson`, loop controls and `generation`
blocks). Loops, calls, sizes and time are bounded. Whatever differs from one rendering to the next is fixed or refused:
the date, random choices, addresses of objects.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000
MAX_SECONDS = 5.0
MAX_SIZE = 10_000_000
MAX_NUMBER = 1_000_000
MAX_TEMPLATE = 1_000_000
_WIDE_FORMAT = re.compile(r"\d{6}")


class TooMuch(jinja2.TemplateError):
    """A template takes more steps, time or memory than any chat needs."""


MARKS = ("\ufdd0the model writes from here\ufdd0", "\ufdd0to here\ufdd0")
"""What a rendered text has around a `generation` block. No text of a user has these characters."""


class _Generation(Extension):
    """The tag with which templates mark what a model writes. The text gets `MARKS` there."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in MARKS)
        return [begin, *body, end]


class _Limits(NodeTransformer):
    """Put a count on each loop and a check of size on each text that is put together."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def _filtered(self, node: Any, name: str, line: int) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=line, environment=self._environment)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._filtered(node.iter, "_counted", node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._filtered(node, "_sized", node.lineno)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = self._filtered(node.filter, "_sized", node.lineno)
        return node


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment. `start` must precede each rendering.

    Args:
        date: what `strftime_now` formats.
    """

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, date: datetime) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_printable
        )
        self._date = date
        self.start()
        self.filters = {name: self._guard(function) for name, function in self.filters.items()}
        self.filters |= {"tojson": _tojson, "random": _no_random, "_sized": sized, "_counted": self._counted}
        self.globals |= {"raise_exception": _raise, "strftime_now": self._strftime}
        del self.globals["lipsum"]

    def start(self) -> None:
        """Begin the steps and the time of a rendering."""
        self._steps, self._deadline = 0, time.monotonic() + MAX_SECONDS

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Limits(self).visit(source), *args, **kwargs)

    def _spend(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS or time.monotonic() > self._deadline:
            raise TooMuch(f"it takes more than {MAX_STEPS:,} steps or {MAX_SECONDS:.0f} seconds")

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._spend()
            yield item

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._spend()
        _check_numbers((*args, *kwargs.values()))
        own = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(own, str) and getattr(function, "__name__", "").startswith("format"):
            _check_format(own)
        return sized(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._spend()
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            _check_numbers(right if isinstance(right, tuple) else (right,))
        if operator == "*":
            _check_product(left, right)
        if operator == "**":
            _check_numbers((left, right), 1000)
        return sized(super().call_binop(context, operator, left, right))

    def _guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose numbers and result are bounded. It keeps Jinja's marks on the function."""

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._spend()
            _check_numbers((*args[1:], *kwargs.values()))
            if function.__name__ == "do_format":
                _check_format(str(args[0]))
            return sized(function(*args, **kwargs))

        return bounded

    def _strftime(self, form: str) -> str:
        _check_format(form)
        return self._date.strftime(form)


def sized(value: Any) -> Any:
    """The value, if it is not too large."""
    if isinstance(value, str | bytes | list | tuple | Mapping) and len(value) > MAX_SIZE:
        raise TooMuch(f"it makes a text or list of more than {MAX_SIZE:,} parts")
    if isinstance(value, int) and value.bit_length() > 10_000:
        raise TooMuch("it makes a number of more than 10,000 bits")
    return value


def _check_product(left: Any, right: Any) -> None:
    for many, number in ((left, right), (right, left)):
        if isinstance(many, str | bytes | list | tuple) and isinstance(number, int) and len(many) * number > MAX_SIZE:
            raise TooMuch(f"it makes a text or list of more than {MAX_SIZE:,} parts")


def _check_numbers(values: Iterable[Any], largest: int = MAX_NUMBER) -> None:
    for value in values:
        if isinstance(value, int | float) and abs(value) > largest:
            raise TooMuch(f"it uses a number above {largest:,}")


def _check_format(form: str) -> None:
    if len(form) > MAX_NUMBER or _WIDE_FORMAT.search(form):
        raise TooMuch("it formats a text to a width of more than five digits")


def _printable(value: Any) -> Any:
    """Refuse to print a function or an object, whose text holds an address."""
    if isinstance(value, jinja2.Undefined) or not (callable(value) or " at 0x" in _text_of_object(value)):
        return value
    raise jinja2.TemplateError(f"it prints a {type(value).__name__}")


def _text_of_object(value: Any) -> str:
    return "" if isinstance(value, str | int | float | bool | list | tuple | Mapping) or value is None else str(value)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without the escapes of HTML, as transformers defines it."""
    _check_numbers((indent,) if isinstance(indent, int) else ())
    return sized(
        json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _no_random(*_: Any) -> None:
    raise jinja2.TemplateError("it draws at random, so equal configurations would give different texts")
