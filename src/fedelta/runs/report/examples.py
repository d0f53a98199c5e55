"""Some answers of the final models beside the reference and the answer of the initial model."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fedelta.errors import FedeltaError
from fedelta.federation.generations import BEFORE, TEST
from fedelta.federation.records import GeneratedAnswer
from fedelta.reading import read_json
from fedelta.runs.finished import Run

MODEL = "after"
"""Name of the final model if there is only one."""
_BREAKS_BEFORE, _BREAKS_AFTER = "<[\n", ">]\n"
"""Characters before and after which a prompt may be cut: those of line breaks and special tokens."""
_MAX_TOKENIZER = 2**28
_HEADER = re.compile(r"\s*(?:(?:user|human)\s*\n)?", re.IGNORECASE)
_ANSWERS_NEXT = re.compile(r"\W*(?:(?:assistant|model)\W*)?(?:\W*think\W*)*", re.IGNORECASE)
"""What templates write around special tokens: before a user's text, and where an answer begins."""


class Example(NamedTuple):
    """Answers to one prompt of the test split.

    Args:
        prompt: the prompt, of a chat its last turn, without what all prompts share.
        reference: the first text that an answer is compared with.
        before: answer of the initial model; None if it was not evaluated.
        answers: name of the model and its answer.
    """

    prompt: str
    reference: str
    before: str | None
    answers: list[tuple[str, str]]


def pick_examples(runs: Sequence[Run], count: int, max_methods: int | None = None) -> list[Example]:
    """Pick prompts that are spread evenly over the test split, whatever the answers are.

    Args:
        runs: finished runs. Each method is represented by its first run.
        count: maximum number of prompts.
        max_methods: maximum number of methods, those with the best test scores. None takes all of them.

    Returns:
        The examples; none if the runs have not generated text.
    """
    chosen = _first_runs(runs, max_methods)
    if not chosen:
        return []
    records = [run.folder.generations.records() for run in chosen]
    tests, befores = ([_by_row(each, round) for each in records] for round in (TEST, BEFORE))
    rows = [row for row in tests[0] if all(row in test for test in tests)]
    special = _special_tokens(chosen[0].adapter)
    turns = [last_turn(tests[0][row]["prompt"], special) for row in rows]
    short = dict(zip(rows, without_shared(turns), strict=True))
    examples = []
    for row in _spread(rows, count):
        first, before = tests[0][row], befores[0].get(row)
        answers = []
        for run, test in zip(chosen, tests, strict=True):
            name = run.config.method.name if len(chosen) > 1 else MODEL
            client = test[row].get("client")
            answers.append((f"{name}, {client}" if client else name, test[row]["answer"]))
        reference = first["references"][0] if first["references"] else ""
        examples.append(Example(short[row], reference, before["answer"] if before else None, answers))
    return examples


def _first_runs(runs: Sequence[Run], max_methods: int | None) -> list[Run]:
    """The run of each method with the lowest seed, in the order of `runs`."""
    first: dict[str, Run] = {}
    for run in runs:
        known = first.get(run.config.method.name)
        if known is None or run.config.seed < known.config.seed:
            first[run.config.method.name] = run
    chosen = list(first.values())
    if max_methods is not None and len(chosen) > max_methods:
        metric = chosen[0].config.task.judged
        best = sorted(chosen, key=lambda run: run.test[metric.name], reverse=not metric.lower)[:max_methods]
        chosen = [run for run in chosen if run in best]
    return chosen


def _by_row(records: Sequence[GeneratedAnswer], round: str) -> dict[int, GeneratedAnswer]:
    """Row → its answer; of several clients the first one's."""
    found: dict[int, GeneratedAnswer] = {}
    for record in records:
        if record["round"] == round:
            found.setdefault(record["row"], record)
    return found


def _spread(rows: Sequence[int], count: int) -> list[int]:
    number = min(count, len(rows))
    return [rows[len(rows) * (2 * i + 1) // (2 * number)] for i in range(number)]


def _special_tokens(adapter: Path) -> list[str]:
    """Special tokens of the tokenizer beside an adapter; none if there is no such file."""
    files = [adapter / "tokenizer.json", *sorted(adapter.glob("*/tokenizer.json"))]
    try:
        tokens = read_json(next(filter(Path.is_file, files)), _MAX_TOKENIZER)["added_tokens"]
        return [token["content"] for token in tokens if token["special"] and token["content"]]
    except (FedeltaError, StopIteration, KeyError, TypeError):
        return []


def last_turn(prompt: str, special: Sequence[str]) -> str:
    r"""Return the last turn before the answer, without special tokens; a prompt without turns is returned whole.

    Args:
        prompt: text of the prompt, with special tokens.
        special: the tokenizer's special tokens.

    Example:
        >>> chat = "<s>system\nBe brief.<e>\n<s>user\nHi<e>\n<s>assistant\nHello.<e>\n<s>user\nWhy?<e>\n<s>assistant\n"
        >>> last_turn(chat, ["<s>", "<e>"])
        'Why?'
        >>> last_turn("<s>a red ship is :", ["<s>"])
        'a red ship is :'
    """
    if not special:
        return prompt
    longest_first = sorted(special, key=len, reverse=True)
    parts = re.split("|".join(map(re.escape, longest_first)), prompt)
    found = next((part for part in reversed(parts) if not _ANSWERS_NEXT.fullmatch(part)), prompt)
    header = _HEADER.match(found)
    # White space at the end of a plain prompt is part of it.
    return found[header.end() :].rstrip() if header and len(parts) > 2 else found


def without_shared(prompts: Sequence[str]) -> list[str]:
    r"""Return prompts without the begin and the end that all of them share, such as a system turn or an instruction.

    They are cut at line breaks and special tokens only.

    Example:
        >>> without_shared(["<user>\nWhat is\n\n1 + 1?<end>\n", "<user>\nWhat is\n\n2 + 2?<end>\n"])
        ['1 + 1?', '2 + 2?']
        >>> without_shared(["a red ship", "a red star"])
        ['a red ship', 'a red star']
    """
    if len(set(prompts)) < 2:
        return list(prompts)
    begin = _common([*prompts], _BREAKS_AFTER)
    rest = [prompt[begin:] for prompt in prompts]
    end = _common([each[::-1] for each in rest], _BREAKS_BEFORE)
    shorter = [each[: len(each) - end].strip() for each in rest]
    return [short or whole for short, whole in zip(shorter, prompts, strict=True)]


def _common(texts: Sequence[str], breaks: str) -> int:
    """Number of characters that all texts have at their begin, up to the last of `breaks` among them."""
    first, last = min(texts), max(texts)
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return max((i + 1 for i, c in enumerate(first[:common]) if c in breaks), default=0)
