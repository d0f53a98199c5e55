"""The answer in a generated text, in a form in which equal answers are equal strings."""

import re
from collections.abc import Callable, Mapping
from typing import Literal

AnswerForm = Literal["text", "number", "boxed", "option"]

_NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?:(?<![\w)])-)?\$?\.\d+")
_MARK = re.compile(r"####\s*(.+)")
_OPTION = re.compile(r"\b(?:solution|answer|option|ending)\s?[1-9]\b|\b(?:true|false)\b", re.IGNORECASE)


def _text(text: str) -> str | None:
    return " ".join(text.lower().split()) or None


def _number(text: str) -> str | None:
    """The number after `####`, as GSM8K ends, else the last one; without thousands, currency and trailing zeros."""
    marked = _MARK.search(text)
    found = _NUMBER.findall(marked[1] if marked else text)
    if not found:
        return None
    plain = (found[0] if marked else found[-1]).replace(",", "").replace("$", "")
    return f"{float(plain):.12g}"


def _boxed(text: str) -> str | None:
    r"""What the last \boxed{…} holds, as in MATH, or what follows the last «answer is»; spellings
    of LaTeX are made equal."""
    begin = text.rfind(r"\boxed{")
    if begin < 0:
        # As MetaMathQA ends.
        _, said, rest = text.rpartition("answer is")
        return _latex(rest.lstrip(": ").splitlines()[0]) if said and rest.strip(": \n") else None
    depth, start = 1, begin + len(r"\boxed{")
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return _latex(text[start:end])
    return None


def _latex(text: str) -> str | None:
    for old, new in (
        (r"\left", ""),
        (r"\right", ""),
        (r"\!", ""),
        (r"\,", ""),
        (r"\ ", ""),
        ("dfrac", "frac"),
        ("tfrac", "frac"),
        (r"\$", ""),
        ("$", ""),
        (r"\%", ""),
        ("%", ""),
        (r"^{\circ}", ""),
        (r"^\circ", ""),
    ):
        text = text.replace(old, new)
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", text.replace(" ", ""))
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text).rstrip(".")
    return text or None


def _option(text: str) -> str | None:
    """The first option that is named, as in the commonsense tasks of LLM-Adapters: `answer2`, `true`."""
    found = _OPTION.search(text)
    return found[0].lower().replace(" ", "") if found else None


ANSWERS: Mapping[AnswerForm, Callable[[str], str | None]] = {
    "text": _text,
    "number": _number,
    "boxed": _boxed,
    "option": _option,
}
"""Form → the answer in a text; None where there is none, which is never right."""
