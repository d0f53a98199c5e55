"""Extraction of the answer from a generated text, normalized so that equal answers are equal strings."""

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Literal

MAX_BOXES, MAX_DIGITS = 100, 1000
"""A model may write anything: number of boxes that are tried, and characters up to which an answer is a number."""
AnswerForm = Literal["text", "number", "boxed", "option"]

_NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?:(?<![\w)])-)?\$?\.\d+")
_GSM8K_MARK = re.compile(r"####\s*(.+)")
_ANSWER_IS = re.compile(r"answer is", re.IGNORECASE)
_OPTION = re.compile(r"\b(solution|answer|option|ending)[\s:]*([1-9])\b|\b(true|false)\b", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|([^\s{$\\]+))")

# Replacements that make spellings of LaTeX equal, in the order of application: the rules of Hendrycks' MATH and more.
_SPELLINGS = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\s+", " "),
        (r"\\left|\\right", ""),
        (r"\{,\}", ","),
        (r"\\[dt]frac", r"\\frac"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)", ""),
        (r"\\?[$%]", ""),
        # A \text{…} that begins with a space is the unit of a number; any other is the answer itself.
        (r"(?<=\S)\s*\\(?:text|mbox|mathrm)\{\s[^{}]*\}\s*$", ""),
        (r"\\(?:text|mbox|mathrm|textbf|mathbf|textit)\{([^{}]*)\}", r"\1"),
        # Spaces, with a backslash or without. The two backslashes at the end of a matrix row are not a space.
        (r"(?<!\\)\\[ !,;:]", ""),
        (r" ", ""),
        (r"^[A-Za-z](?:=|\\in(?![a-z]))", ""),
        (r"\\(frac|sqrt)(\w)", r"\\\1{\2}"),
        (r"(\\frac\{[^{}]*\})(\w)", r"\1{\2}"),
        (r"([_^])(\w)", r"\1{\2}"),
        (r"(?<![\d.])\.(?=\d)", "0."),
        (r"\.$", ""),
    )
]
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_DECIMAL = re.compile(r"-?\d+(?:\.\d+)?")
_FRACTION = re.compile(r"(-?)(?:(-?\d+)/(\d+)|\\frac\{(-?\d+)\}\{(\d+)\})")


def _text(text: str) -> str | None:
    return " ".join(text.lower().split()) or None


def _after_answer_is(text: str) -> str:
    """Text after the last «answer is», with which MetaMathQA and LLM-Adapters end. Empty if it does not occur."""
    matches = list(_ANSWER_IS.finditer(text))
    return text[matches[-1].end() :].strip(": \n") if matches else ""


def _number(text: str) -> str | None:
    """The number after `####` (as in GSM8K) or after «answer is», else the last number in the text.

    Thousands separators, currency signs and trailing zeros are removed.
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    marked = _GSM8K_MARK.search(text)
    last = _NUMBER.findall(text)[-1:]
    numbers = _NUMBER.findall(marked[1] if marked else _after_answer_is(text))[:1] or last
    return f"{float(numbers[0].replace(',', '').replace('$', '')):.12g}" if numbers else None


def _boxed(text: str) -> str | None:
    r"""Content of the last closed \boxed{…} (as in MATH), else the text after «answer is».

    Different LaTeX spellings of the same answer become equal.
    """
    for box in reversed(list(_BOXED.finditer(text))[-MAX_BOXES:]):
        inner = box[1] or _braced(text, box.end())
        if inner is not None:
            return _latex(inner)
    if not (stated := _after_answer_is(text)):
        return None
    dollars = re.match(r"\$([^$]+)\$", stated)
    return _latex(dollars[1] if dollars else re.split(r"\.\s|\n", stated)[0])


def _braced(text: str, begin: int) -> str | None:
    """Text from `begin` to the brace that closes the one before it. None if that brace is never closed."""
    depth = 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end]
    return None


def _latex(text: str) -> str | None:
    for pattern, plain in _SPELLINGS:
        text = pattern.sub(plain, text.strip())
    if len(text) > MAX_DIGITS:
        return text
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    ratio = _FRACTION.fullmatch(text)
    if _DECIMAL.fullmatch(text):
        return str(Fraction(text))
    if ratio and int(ratio[3] or ratio[5]):
        value = Fraction(int(ratio[2] or ratio[4]), int(ratio[3] or ratio[5]))
        return str(-value if ratio[1] else value)
    return text or None


def _option(text: str) -> str | None:
    """The option after «answer is», else the first one in the text, such as `answer2` or `true`."""
    option = _OPTION.search(_after_answer_is(text)) or _OPTION.search(text)
    return "".join(part for part in option.groups() if part).lower() if option else None


ANSWERS: Mapping[AnswerForm, Callable[[str], str | None]] = {
    "text": _text,
    "number": _number,
    "boxed": _boxed,
    "option": _option,
}
"""Form → function that extracts the answer from a text. None means that there is no answer, and is never correct."""
