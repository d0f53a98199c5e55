"""What lm-evaluation-harness calls to compare a generated solution with MATH's."""

from collections.abc import Mapping, Sequence

from fedelta.learning.tasks.answers import ANSWERS


def exact_match(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    r"""Whether the answer in the generated text, in \boxed{…} or after «answer is», is the one in the solution."""
    read = ANSWERS["boxed"]
    answer = read(results[0])
    return {"exact_match": float(answer is not None and answer == read(doc["solution"]))}
