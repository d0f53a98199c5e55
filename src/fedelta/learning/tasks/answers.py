"""The answer in a generated text, in a form in which equal answers are equal strings."""

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Literal

AnswerForm = Literal["text", "number", "boxed", "option"]

_NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?:(?<![\w)])-)?\$?\.\d+")
_MARK = re.compile(r"####\s*(.+)")
_SAID = re.compile(r"answer is", re.IGNORECASE)
_OPTION = re.compile(r"\b(solution|answer|option|ending)[\s:]*([1-9])\b|\b(true|false)\b", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|([^\s{$\\]+))")

# Spellings of LaTeX, in the order in which they are made equal; the rules of Hendrycks' MATH and some more.
_SPELLINGS = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\s+", " "),
        (r"\\left|\\right", ""),
        (r"\{,\}", ","),
        (r"\\[dt]frac", r"\\frac"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)", ""),
        (r"\\?[$%]", ""),
        # A unit behind a number, which begins with a space; other texts are the answer.
        (r"(?<=\S)\s*\\(?:text|mbox|mathrm)\{\s[^{}]*\}\s*$", ""),
        (r"\\(?:text|mbox|mathrm|textbf|mathbf|textit)\{([^{}]*)\}", r"\1"),
        # Spaces, after a backslash or not; the two backslashes that end a matrix's row are none.
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


def _said(text: str) -> str:
    """What follows the last «answer is», as MetaMathQA and LLM-Adapters end; empty if nothing does."""
    found = list(_SAID.finditer(text))
    return text[found[-1].end() :].strip(": \n") if found else ""


def _number(text: str) -> str | None:
    """The number after `####`, as GSM8K ends, or after «answer is», else the last one; without thousands, currency and
    trailing zeros."""
    text = text.replace("\N{MINUS SIGN}", "-")
    marked = _MARK.search(text)
    last = _NUMBER.findall(text)[-1:]
    found = _NUMBER.findall(marked[1] if marked else _said(text))[:1] or last
    return f"{float(found[0].replace(',', '').replace('$', '')):.12g}" if found else None


def _boxed(text: str) -> str | None:
    r"""What the last \boxed{…} that is closed holds, as in MATH, else what is said after «answer is»; spellings
    of LaTeX are made equal."""
    for box in reversed(list(_BOXED.finditer(text))):
        inner = box[1] or _braced(text, box.end())
        if inner is not None:
            return _latex(inner)
    if not (said := _said(text)):
        return None
    dollars = re.match(r"\$([^$]+)\$", said)
    return _latex(dollars[1] if dollars else re.split(r"\.\s|\n", said)[0])


def _braced(text: str, begin: int) -> str | None:
    """Up to the brace that closes the one before; None if none does."""
    depth = 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end]
    return None


def _latex(text: str) -> str | None:
    for pattern, plain in _SPELLINGS:
        text = pattern.sub(plain, text.strip())
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
    """The option that is named after «answer is», else the first one: `answer2`, `true`."""
    found = _OPTION.search(_said(text)) or _OPTION.search(text)
    return "".join(part for part in found.groups() if part).lower() if found else None


ANSWERS: Mapping[AnswerForm, Callable[[str], str | None]] = {
    "text": _text,
    "number": _number,
    "boxed": _boxed,
    "option": _option,
}
"""Form → the answer in a text; None where there is none, which is never right."""
